"""PackedBatch: the interface between data and model, and the layout of samples in it.

A micro-batch is one or more packs end to end on one axis of S tokens. Each sample is contiguous: first its image
patches, then its text tokens. Padding is at the end of each pack. The configuration fixes S; N and R are rounded up, so
that few distinct shapes occur. Unused entries are zero.

Legend: S tokens, N samples, P patches, R rows with loss, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron.config import PATCH_SIZE, PATCH_VALUES
from genlip_megatron.device import to_device

__all__ = ["PATCH_SIZE", "PATCH_VALUES", "PackedBatch", "Sample", "pack_samples", "sample_positions", "to_image"]

# Counts that vary from batch to batch are rounded up to these.
_SAMPLE_MULTIPLE, _ROW_MULTIPLE = 32, 128


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of packed samples.

    Attributes:
        token_ids: int64 [S]; 0 at image slots and at padding.
        is_image: bool [S]; True where the slot holds an image patch.
        position_ids: int64 [3, S]; the T, H, W rotary positions, restarting with every sample.
        sample_ids: int64 [S]; index of the slot's sample, -1 at padding. Ascending along S, except for padding.
        sample_starts: int64 [N]; the slot of the sample's first token; 0 for unused entries.
        image_lengths: int64 [N]; patches of the sample; 0 for text-only samples and unused entries.
        text_lengths: int64 [N]; text tokens of the sample, prompt and closing tokens included.
        patches: uint8 [P, 768] pixels, or float32 [P, 768] normalised; each row is a patch flattened as (channel, row,
            column) like a Conv2d weight, in the order of the image slots. If ranks share a sequence, at least the
            patches of the rank's own slots. None on pipeline stages without the embedding.
        first_patch: number of image slots before the first of ``patches``.
        loss_rows: int64 [R]; slots whose output predicts an answer token; 0 for unused entries.
        labels: int64 [R]; the token that the row predicts.
        loss_weights: float32 [R]; 1 for an answer token, 0 for unused or masked rows.
        drop_path: float32 [L, 2, N]; factor of each residual branch, 0 or 1 / (1 - p). None keeps all branches.
        keys: names of the samples in order, for logs and error messages.
    """

    token_ids: Tensor
    is_image: Tensor
    position_ids: Tensor
    sample_ids: Tensor
    sample_starts: Tensor
    image_lengths: Tensor
    text_lengths: Tensor
    patches: Tensor | None
    loss_rows: Tensor
    labels: Tensor
    loss_weights: Tensor
    drop_path: Tensor | None = None
    first_patch: int = 0
    keys: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Slots of the micro-batch, padding included (S)."""
        return self.token_ids.shape[0]

    @property
    def sequence_positions(self) -> Tensor:
        """int64 [3, S]: the index of each token in its sample, on every axis; 0 at padding."""
        index = torch.arange(self.num_tokens, device=self.sample_ids.device)
        index = index - self.sample_starts[self.sample_ids.clamp(min=0)]
        return index.where(self.sample_ids >= 0, 0).expand(3, -1)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on ``device``; the host does not wait for copies to a GPU."""
        return self._map(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> PackedBatch:
        """The same batch with its host tensors page-locked, for asynchronous copies by ``to``."""
        return self._map(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def with_fixed_shapes(self) -> PackedBatch:
        """The same batch padded with zeros so that most micro-batches of a run have one shape: S patches, N rounded up
        to a power of two, R to a multiple of S / 64."""
        samples, rows = len(self.sample_starts), len(self.loss_rows)
        coarse = max(_ROW_MULTIPLE, self.num_tokens // 64)
        more = dict.fromkeys(("sample_starts", "image_lengths", "text_lengths"), power_of_two(samples) - samples)
        more |= dict.fromkeys(("loss_rows", "labels", "loss_weights"), -rows % coarse)
        changed: dict[str, Any] = {name: F.pad(getattr(self, name), (0, count)) for name, count in more.items()}
        if self.drop_path is not None:
            changed["drop_path"] = F.pad(self.drop_path, (0, more["sample_starts"]))
        if self.patches is not None:
            changed["patches"] = F.pad(self.patches, (0, 0, 0, self.num_tokens - len(self.patches)))
        return replace(self, **changed)

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)


@dataclass(frozen=True)
class Sample:
    """One image and its text, ready to be packed.

    Attributes:
        patches: uint8 [rows * columns, 768], row major; None if another rank holds them. The samples with patches are
            consecutive.
        rows, columns: the patch grid; 0 without an image.
        token_ids: the text, prompt and closing tokens included.
        loss_mask: whether each text token is predicted; empty for a prompt without an answer.
        weight: of the answer tokens in the loss; 0 for a sample that stays in the pack but must not be learned.
        key: name, for logs and error messages.
    """

    patches: Tensor | None
    rows: int
    columns: int
    token_ids: Sequence[int]
    loss_mask: Sequence[bool] = ()
    weight: float = 1.0
    key: str = ""


def power_of_two(number: int) -> int:
    """``number`` rounded up to a power of two.

    >>> power_of_two(0), power_of_two(32), power_of_two(33)
    (1, 32, 64)
    """
    return 1 << max(number - 1, 0).bit_length()


def to_image(patches: Tensor, rows: int, columns: int) -> Tensor:
    """uint8 [3, rows * 16, columns * 16] from patches [rows * columns, 768]."""
    grid = patches.reshape(rows, columns, 3, PATCH_SIZE, PATCH_SIZE).permute(2, 0, 3, 1, 4)
    return grid.reshape(3, rows * PATCH_SIZE, columns * PATCH_SIZE)


def sample_positions(rows: int, columns: int, text_length: int) -> np.ndarray:
    """int64 [3, rows * columns + text_length]: T, H, W positions of a sample, image first.

    Patch (h, w) is at (0, h, w); text token k at max(rows, columns) + k on every axis.

        >>> sample_positions(1, 2, 2).tolist()
        [[0, 0, 2, 3], [0, 0, 2, 3], [0, 1, 2, 3]]
    """
    count = rows * columns
    positions = np.zeros((3, count + text_length), dtype=np.int64)
    positions[1, :count] = np.repeat(np.arange(rows), columns)
    positions[2, :count] = np.tile(np.arange(columns), rows)
    positions[:, count:] = np.arange(text_length) + max(rows, columns)
    return positions


def pack_samples(packs: Sequence[Sequence[Sample]], seq_length: int) -> PackedBatch:
    """One micro-batch of ``len(packs)`` packs of ``seq_length`` tokens each; the samples of a pack must fit in it.

    The slot before an answer token predicts it. The last prompt token predicts the first answer token; with an empty
    prompt the last image token does.

    Raises:
        ValueError: a sample does not fit its pack.
    """
    samples = [sample for pack in packs for sample in pack]
    slots = seq_length * len(packs)
    token_ids, sample_ids = np.zeros(slots, np.int64), np.full(slots, -1, np.int64)
    is_image, positions = np.zeros(slots, bool), np.zeros((3, slots), np.int64)
    padded = max(-(-len(samples) // _SAMPLE_MULTIPLE), 1) * _SAMPLE_MULTIPLE
    starts, images, texts = (np.zeros(padded, np.int64) for _ in range(3))
    rows, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    number = 0
    for i, pack in enumerate(packs):
        slot = i * seq_length
        for sample in pack:
            count, length = sample.rows * sample.columns, len(sample.token_ids)
            end = slot + count + length
            if end > (i + 1) * seq_length:
                raise ValueError(f"sample {sample.key!r} of {count + length} tokens does not fit its pack")
            token_ids[slot + count : end] = sample.token_ids
            sample_ids[slot:end] = number
            is_image[slot : slot + count] = True
            positions[:, slot:end] = sample_positions(sample.rows, sample.columns, length)
            starts[number], images[number], texts[number] = slot, count, length
            answers = np.flatnonzero(np.asarray(sample.loss_mask, bool)) + slot + count
            rows.append(answers - 1)
            weights.append(np.full(len(answers), sample.weight, np.float32))
            slot, number = end, number + 1
    loss_rows = np.concatenate(rows)
    fill = max(-(-len(loss_rows) // _ROW_MULTIPLE), 1) * _ROW_MULTIPLE - len(loss_rows)
    patches = [sample.patches for sample in samples if sample.patches is not None]
    before = itertools.takewhile(lambda sample: sample.patches is None, samples)
    first_patch = sum(sample.rows * sample.columns for sample in before) if patches else 0
    return PackedBatch(
        token_ids=torch.from_numpy(token_ids),
        is_image=torch.from_numpy(is_image),
        position_ids=torch.from_numpy(positions),
        sample_ids=torch.from_numpy(sample_ids),
        sample_starts=torch.from_numpy(starts),
        image_lengths=torch.from_numpy(images),
        text_lengths=torch.from_numpy(texts),
        patches=torch.cat(patches) if patches else None,
        loss_rows=torch.from_numpy(np.pad(loss_rows, (0, fill))),
        labels=torch.from_numpy(np.pad(token_ids[np.minimum(loss_rows + 1, slots - 1)], (0, fill))),
        loss_weights=torch.from_numpy(np.pad(np.concatenate(weights), (0, fill))),
        first_patch=first_patch,
        keys=tuple(sample.key for sample in samples),
    )
