"""The folder of a probe: what a killed one resumes from, and its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from genlip_megatron import atomic_write
from genlip_megatron.encoders.cache import FeatureCache
from genlip_megatron.evaluate import ranks

_STATE, _RESULT = "state.pt", "result.json"


class Stamped(Protocol):
    """A sample of a data set."""

    @property
    def stamp(self) -> str:
        """Changes when the sample may have."""


def digest(samples: Sequence[Stamped]) -> str:
    """Hexadecimal digest of a list of samples: their files and labels."""
    found = hashlib.blake2b(digest_size=16)
    for sample in samples:
        found.update(sample.stamp.encode() + b"\n")
    return found.hexdigest()


class ProbeFolder:
    """The folder of one encoder's probe. Every rank reads it, rank 0 writes it; each file appears when it is complete.

    Args:
        folder: holds nothing, or a probe with equal settings.
        settings: what decides the result.

    Raises:
        ValueError: it holds a probe with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self._settings = folder, json.loads(json.dumps(settings))
        path = folder / "settings.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in {**found, **self._settings} if found.get(key) != self._settings.get(key)]
            if differing:
                key = differing[0]
                raise ValueError(
                    f"--output {folder}: holds a probe with another {key}, {found.get(key)}, not "
                    f"{self._settings.get(key)}. Name another folder, or remove this one."
                )
        ranks.wait()  # no rank may read the file of this call
        if ranks.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write.write(path, json.dumps(self._settings, indent=1))

    def result(self) -> dict[str, Any] | None:
        """The result, if the probe is finished."""
        path = self.folder / _RESULT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the result; the state is no longer needed. Returns it with the settings."""
        whole = {**result, "settings": self._settings}
        if ranks.rank() == 0:
            atomic_write.write(self.folder / _RESULT, json.dumps(whole, indent=1))
            (self.folder / _STATE).unlink(missing_ok=True)
        ranks.wait()
        return whole

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the state after ``step`` steps."""
        if ranks.rank() == 0:
            with atomic_write.atomic_path(self.folder / _STATE) as partial:
                torch.save({"step": step, "tensors": dict(tensors)}, partial)

    def load(self, device: torch.device) -> tuple[int, dict[str, Tensor]]:
        """(number of steps done, the tensors); (0, {}) if there is no state.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.folder / _STATE
        if not path.is_file():
            return 0, {}
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            return int(state["step"]), state["tensors"]
        except Exception as error:  # torch raises many kinds for damaged files
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{path}: damaged ({reason}). Remove it; the probe then starts again.") from None


def fill(cache: FeatureCache, what: str) -> FeatureCache:
    """Compute a cache's missing features on all ranks."""
    world_size = ranks.world_size()
    ranks.wait()  # a rank that still opens the cache must not see it half made
    with progress_bar(len(cache), 0, what, "image") as bar:
        cache.fill(32, lambda images: bar.update(images * world_size), ranks.rank(), world_size)
    ranks.wait()
    return cache


def progress_bar(total: int, done: int, what: str, unit: str) -> Any:
    """A progress bar with the time left, on standard error of rank 0."""
    import sys

    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=what, unit=unit, file=sys.stderr, disable=ranks.rank() != 0)
