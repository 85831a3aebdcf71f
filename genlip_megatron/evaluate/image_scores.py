"""Scores of many images, kept on disk in parts, so that a killed run continues where it was."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from genlip_megatron import atomic_write
from genlip_megatron.evaluate.labelled import Source
from genlip_megatron.evaluate.probe_state import digest, progress_bar
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.infer.inputs import ShardImage
from genlip_megatron.infer.prepare import Prepared, batches, prepared

PART = 64  # images


class Image(Protocol):
    """An image to score."""

    @property
    def name(self) -> dict[str, str]:
        """For messages."""

    @property
    def stamp(self) -> str:
        """Changes when its scores may have."""

    def read(self) -> np.ndarray:
        """uint8 [height, width, 3]."""


@dataclass(frozen=True)
class SourceImage:
    """An image of a data set with labels, or an image file.

    Attributes:
        source: where it is.
        texts: token ids of its own texts, where each image has others.
    """

    source: Source
    texts: tuple[tuple[int, ...], ...] = ()

    @property
    def name(self) -> dict[str, str]:
        return {"path": self.source.name}

    @property
    def stamp(self) -> str:
        return f"{self.source.stamp} {self.texts}"

    def read(self) -> np.ndarray:
        return np.asarray(self.source.read())


@dataclass(frozen=True)
class ShardSample:
    """A sample of an indexed shard."""

    sample: ShardImage

    @property
    def name(self) -> dict[str, str]:
        return self.sample.name

    @property
    def stamp(self) -> str:
        index, number = self.sample.index, self.sample.number
        return f"{index.shard} {index.keys[number]} {index.rows[number]['image_crc']}"

    def read(self) -> np.ndarray:
        return self.sample.read()


def score_images(
    images: Sequence[Image],
    score: Callable[[Sequence[Prepared], Sequence[Image]], Tensor],
    width: int,
    *,
    processor: GenLIPImageProcessor,
    key: object,
    folder: Path,
    batch_size: int,
    what: str,
) -> Tensor:
    """Scores of all images.

    The name of a part's file is the digest of all that decides its scores, so a part is never taken for another.

    Args:
        images: those to score.
        score: float32 [B, width] of B prepared images.
        width: scores of each image.
        processor: the model's.
        key: what decides the scores beside the images; its ``repr`` enters the digest.
        folder: holds the finished parts.
        batch_size: most images of a call of ``score``.
        what: text of the progress bar.

    Returns:
        float32 [images, width].

    Raises:
        ValueError: an image cannot be used.
    """
    parts = [images[start : start + PART] for start in range(0, len(images), PART)]
    files = [folder / f"{hashlib.blake2b(f'{key!r} {digest(part)}'.encode(), digest_size=16).hexdigest()}.npy"
             for part in parts]  # fmt: skip
    found = [_read(file, len(part), width) for file, part in zip(files, parts, strict=True)]
    left = [number for number, scores in enumerate(found) if scores is None]
    waiting = list(itertools.chain.from_iterable(parts[number] for number in left))
    ready = prepared(cast(Any, waiting), processor)
    with progress_bar(len(images), len(images) - len(waiting), what, "image") as bar:
        for number in left:
            rows = []
            for batch in batches(itertools.islice(ready, len(parts[number])), size=batch_size):
                for image in batch:
                    _check(image)
                rows.append(score(batch, [waiting[image.number] for image in batch]))
                bar.update(len(batch))
            scores = torch.cat(rows).numpy()
            with atomic_write.atomic_path(files[number]) as partial, partial.open("wb") as file:
                np.save(file, scores)
            found[number] = scores
    return torch.from_numpy(np.concatenate(cast(Any, found)))


def _read(file: Path, rows: int, width: int) -> np.ndarray | None:
    """A finished part; None if it is missing or damaged."""
    try:
        scores = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return scores if scores.shape == (rows, width) and scores.dtype == np.float32 else None


def _check(image: Prepared) -> None:
    if image.error:
        (name,) = image.name.values()
        error = image.error.removeprefix(f"{name}: ")
        raise ValueError(f"{name}: {error}. Replace or remove this image; a new run keeps the scores so far.")
