"""What the command line sets for every probe, and what decides the result of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genlip_megatron.encoders.interface import Encoder
from genlip_megatron.evaluate.probe_state import Stamped, digest


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What the command line sets in addition to the preset.

    Attributes:
        size: side of the images in pixels; None: native shapes.
        cache: folder of features.
        batch_size: of all ranks together; 0: the preset's.
        max_steps: largest number of updates, 0: the preset's. The learning rates fall to their end within them.
        workers: processes that read images.
        seed: of heads, order and augmentation.
        save_interval: steps between two saved states.
        cache_dtype: of the files of features.
    """

    size: int | None
    cache: Path
    batch_size: int = 0
    max_steps: int = 0
    workers: int = 0
    seed: int = 0
    save_interval: int = 500
    cache_dtype: torch.dtype = torch.float32

    def deciding(self) -> dict[str, Any]:
        """Those that decide the result."""
        chosen = {name: getattr(self, name) for name in ("size", "batch_size", "max_steps", "seed")}
        return {**chosen, "cache_dtype": str(self.cache_dtype).removeprefix("torch.")}


def settings(
    encoder: Encoder,
    protocol: str,
    train: Sequence[Stamped],
    val: Sequence[Stamped],
    classes: int,
    options: ProbeOptions,
) -> dict[str, Any]:
    """What decides the result of a probe."""
    return {
        "encoder": encoder.name,
        "fingerprint": encoder.fingerprint,
        "protocol": protocol,
        "classes": classes,
        "train": digest(train),
        "val": digest(val),
        **options.deciding(),
    }
