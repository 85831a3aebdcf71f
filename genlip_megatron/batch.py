"""PackedBatch (and Request, its counterpart for captions): the contract between the data side and the model side.

A micro-batch is one or more packs laid end to end on one axis of S tokens. Each sample lies in one piece: its
image patches first, then its text tokens. Padding stands at the end of each pack. All shapes are fixed by the
configuration, so that kernels and graphs see the same shapes at every step; what is not used is zero.

Legend: S tokens, N = max_samples, P = max_patches, R = max_loss_rows, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

PATCH_SIZE = 16
PATCH_VALUES = 3 * PATCH_SIZE * PATCH_SIZE


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of packed samples.

    Attributes:
        token_ids: int64 [S]; 0 at image slots and at padding.
        is_image: bool [S]; True where the slot holds an image patch.
        position_ids: int64 [3, S]; the T, H, W rotary positions, restarting with every sample.
        sample_ids: int64 [S]; which of the N samples the slot belongs to, -1 at padding. Ascending along S
            but for padding.
        sample_starts: int64 [N]; the slot of the sample's first token; 0 for unused entries.
        image_lengths: int64 [N]; patches of the sample; 0 for text-only samples and unused entries.
        text_lengths: int64 [N]; text tokens of the sample, prompt and closing tokens included.
        patches: uint8 [P, 768] pixels, or float32 [P, 768] already normalised, each row a patch flattened as
            (channel, row, column) like a Conv2d weight; in the order of the image slots. None on pipeline
            stages that hold no embedding.
        loss_rows: int64 [R]; slots whose output predicts an answer token; 0 for unused entries.
        labels: int64 [R]; the token that the row predicts.
        loss_weights: float32 [R]; 1 for an answer token, 0 for unused or masked rows.
        drop_path: float32 [L, 2, N]; factor of each residual branch, 0 or 1 / (1 - p). None: keep everything.
        keys: names of the real samples in order, for logs and error messages.
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
    keys: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Slots of the micro-batch, padding included (S)."""
        return self.token_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """The same batch with every tensor on ``device``."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def pin(self) -> PackedBatch:
        """The same batch in page-locked memory, so that copies to a GPU overlap with compute."""
        pinned: dict[str, Any] = {
            f.name: value.pin_memory() for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)


@dataclass(frozen=True)
class Request:
    """One image and the prompt that follows it.

    Attributes:
        patches: uint8 [rows * columns, 768], row major.
        rows, columns: the patch grid.
        prompt_ids: tokens of the prompt.
    """

    patches: Tensor
    rows: int
    columns: int
    prompt_ids: Sequence[int]
