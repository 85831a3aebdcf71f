"""Features of images of any size, packed end to end without padding, and written as arrays with an index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from genlip_megatron.convert.conversion import read_json
from genlip_megatron.infer.load import Loaded
from genlip_megatron.infer.prepare import Prepared, packed
from genlip_megatron.outputs import first_other

INDEX = "index.json"
NOT_FINITE = "its features are not all finite numbers"


@torch.inference_mode()
def features(loaded: Loaded, images: Sequence[Prepared], mean: bool = False) -> list[Tensor]:
    """Output of ``ln_post`` for each image: [patches, D], row by row, or with ``mean`` their mean [1, D].

    Args:
        loaded: the vision encoder.
        images: images without errors; they form one pack.
        mean: average over each image's patches.
    """
    patches, grid = packed(images, loaded.model.device)
    output = loaded.model(patches, grid)
    if mean:
        return list(output.pooler_output.split(1))
    return loaded.model.split_images(output.last_hidden_state, grid)


class FeatureWriter:
    """Writes features into files of a folder, many images per file, with an index of their places.

    Every file holds one array ``features`` [rows, D], the images end to end: ``features-00000.safetensors``, or
    ``features-00000.npy``, which NumPy can map into memory.

    Args:
        folder: an empty folder.
        kind: "safetensors" or "npy".
        dtype: of the files: float32, float16 or, in safetensors, bfloat16.
        max_file_size: largest array of a file in bytes; larger ones only hold one image.
    """

    def __init__(self, folder: Path, kind: str, dtype: torch.dtype, max_file_size: int) -> None:
        self._folder, self._kind, self._dtype, self._limit = folder, kind, dtype, max_file_size
        self._rows: list[Tensor] = []
        self._count = self._size = self._files = 0
        self.entries: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []

    def add(self, image: Prepared, rows: Tensor | None) -> None:
        """Add one image's features [n, D]; an image with an error, NaN or Inf counts as failed.

        Raises:
            ValueError: a value does not fit the dtype.
        """
        if rows is None or not bool(rows.isfinite().all()):
            self.failed.append(image.name | {"error": image.error or NOT_FINITE})
            return
        rows = rows.detach().cpu()
        stored = rows.to(self._dtype)
        if not bool(stored.isfinite().all()):
            raise ValueError(f"--feature-dtype fp16: a feature of {rows.abs().max():.3g} is out of range. Use fp32.")
        if self._rows and self._size + stored.nbytes > self._limit:
            self._flush()
        entry = image.name | {
            "file": self._name(),
            "start": self._count,
            "shape": list(stored.shape),
            "grid": [image.rows, image.columns],
        }
        self.entries.append(entry)
        self._rows.append(stored)
        self._count, self._size = self._count + len(stored), self._size + stored.nbytes

    def close(self, facts: dict[str, Any]) -> None:
        """Write the remaining features and the index, which begins with ``facts``."""
        if self._rows:
            self._flush()
        # One line per image, so that people can read the file.
        lists = (
            f'"{name}": [\n' + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n]"
            for name, entries in (("images", self.entries), ("failed", self.failed))
        )
        text = ",\n".join([json.dumps(facts, indent=1)[1:-2].strip("\n"), *lists])
        (self._folder / INDEX).write_text("{\n" + text + "\n}\n", encoding="utf-8")

    def _name(self) -> str:
        return f"features-{self._files:05}.{self._kind}"

    def _flush(self) -> None:
        rows, file = torch.cat(self._rows), self._folder / self._name()
        if self._kind == "npy":
            np.save(file, rows.numpy())
        else:
            save_file({"features": rows}, file)
        self._rows, self._count, self._size = [], 0, 0
        self._files += 1


def foreign(folder: Path) -> str:
    """The first thing in a folder that is not a features file listed in its index; "" if there is none."""
    try:
        index = read_json(folder / INDEX)
        files = {entry["file"] for entry in index["images"]} if {"pool", "failed"} <= set(index) else None
    except (ValueError, KeyError, TypeError):
        files = None
    if files is None:
        return f"no {INDEX} of features"
    return first_other(folder, lambda path: path in (INDEX, *files))
