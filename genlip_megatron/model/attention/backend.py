"""The interface of an attention backend, and the samples that a rank attends.

A rank usually has queries for all slots of the micro-batch. Under context parallelism with gathered keys and values it
has queries for its own slots only, which may begin and end anywhere in a sample.

Legend: S slots of the micro-batch, Q slots with queries, N samples, H local heads, D channels of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.device import to_device
from genlip_megatron.model.rope import apply_rotary


@dataclass(frozen=True)
class Spans:
    """The samples that have queries among slots ``first`` to ``last``, in order. All arrays int64 [N].

    Attributes:
        total: slots of the micro-batch (S).
        first, last: the slots with queries are ``first <= slot < last``.
        starts: the slot of the sample's first token.
        images, texts: numbers of its image tokens and text tokens.
        begins, ends: its tokens with queries are ``begins <= token < ends``; token 0 is its first.
        keys: its queries see its first ``keys`` tokens: the image, and the text up to the last text query.
    """

    total: int
    first: int
    last: int
    starts: np.ndarray
    images: np.ndarray
    texts: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    keys: np.ndarray

    @classmethod
    def of(cls, batch: PackedBatch, first: int = 0, last: int | None = None) -> Spans:
        """The spans of a micro-batch, preferably on the CPU; the host waits for a batch on another device."""
        last = batch.num_tokens if last is None else last
        starts, images, texts = (
            x.cpu().numpy() for x in (batch.sample_starts, batch.image_lengths, batch.text_lengths)
        )
        begins = np.clip(first - starts, 0, images + texts)
        ends = np.clip(last - starts, 0, images + texts)
        used = ends > begins
        keys = np.maximum(images, np.where(ends > images, ends, 0))
        columns = (column[used] for column in (starts, images, texts, begins, ends, keys))
        return cls(batch.num_tokens, first, last, *columns)


@dataclass(frozen=True)
class Place:
    """Where attention runs, and in which form.

    Attributes:
        dtype: of the activations.
        head_dim: channels of a head (D).
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int


class Backend(ABC):
    """Exact prefix-LM attention over the samples of one micro-batch, rotary positions included.

    Args:
        cos, sin: [S, D] on the device: cosine and sine of every slot's rotary angles.

    Attributes:
        rotate: ``rope.apply_rotary``, perhaps compiled.
        has_fixed_shapes: takes ``fixed_shapes=True``, so that CUDA graphs can replay it.
    """

    has_fixed_shapes = False
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(apply_rotary)

    def __init__(self, spans: Spans, batch: PackedBatch, cos: Tensor, sin: Tensor) -> None:
        self._cos, self._sin = cos, sin
        self._queries = slice(spans.first, spans.last)

    @staticmethod
    def why_not(place: Place) -> str | None:
        """Why the backend cannot run at ``place``; None when it can, as everywhere by default."""
        return None

    def turned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their rotary angles."""
        return (
            self.rotate(q, self._cos[self._queries], self._sin[self._queries]),
            self.rotate(k, self._cos, self._sin),
        )

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **own: Any) -> Tensor:
        """[Q, H, D] from queries [Q, H, D], keys and values [S, H, D]; zeros where a slot is padding.

        Args:
            scale: factor of the scores.
            own: state of the layer; only ``fp8.py`` uses it.
        """


def nothing_to_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros [Q, H, D] that pass gradients (of zero) to all three inputs."""
    return 0.0 * q + 0.0 * (k.sum() + v.sum())


def padding_slots(batch: PackedBatch, first: int, last: int, device: torch.device) -> Tensor:
    """int64: the padding slots among ``first`` to ``last``, counted from ``first``."""
    return to_device((batch.sample_ids[first:last].cpu() < 0).nonzero().squeeze(1), device)
