"""Prefix-LM attention as two calls of a variable-length kernel: image queries over their image, text queries, causal
and aligned to the bottom right, over their sample.

Each query gets all its keys in one call, so nothing has to be merged. The kernels are torch's FlashAttention and
Transformer Engine's fused attention, both for GPUs; ``reference_kernel`` is their plain twin, for tests anywhere.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron import host
from genlip_megatron.batch import PackedBatch, power_of_two
from genlip_megatron.model.attention.backend import Backend, Place, Spans, nothing_to_attend
from genlip_megatron.model.engine import why_no_engine


class Kernel(Protocol):
    """Attention of many sequences laid end to end.

    Args:
        q: [sum of query lengths, H, D].
        k, v: [sum of key lengths, H, D].
        cu_q, cu_k: int32 [N + 1], cumulative lengths.
        max_q, max_k: the longest.
        causal: query i of a sequence sees its keys up to ``keys - queries + i`` (aligned to the bottom right).
        scale: factor of the scores.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        causal: bool,
        scale: float,
    ) -> Tensor: ...


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: ``begins[i]`` to ``begins[i] + lengths[i]``, one after the other.

    >>> _ranges(np.array([3, 10]), np.array([2, 1])).tolist()
    [3, 4, 10]
    """
    offsets = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.arange(int(lengths.sum())) - offsets + np.repeat(begins, lengths)


class KernelCall:
    """One kernel call over the samples whose ``queries`` are not 0; rows by slot, counted as the tensors' are.

    Args:
        fixed: (slots S, samples N): both of queries and keys there are then S rows, of which those behind the last
            sample's come from a slot S and go there, and N sequences, the last ones of no length.
    """

    def __init__(
        self,
        query_begins: np.ndarray,
        queries: np.ndarray,
        key_begins: np.ndarray,
        keys: np.ndarray,
        causal: bool,
        device: torch.device,
        fixed: tuple[int, int] | None,
    ) -> None:
        used = queries > 0
        query_begins, queries, key_begins, keys = (x[used] for x in (query_begins, queries, key_begins, keys))
        self.empty, self.causal = not used.any(), causal

        def on_device(numbers: np.ndarray) -> Tensor:
            return host.to_device(torch.from_numpy(numbers), device)

        def cumulative(lengths: np.ndarray) -> Tensor:
            return on_device(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))

        query_slots, key_slots = _ranges(query_begins, queries), _ranges(key_begins, keys)
        longest = [int(lengths.max(initial=0)) for lengths in (queries, keys)]
        if fixed is not None:
            slots, samples = fixed
            query_slots, key_slots = (
                np.pad(rows, (0, slots - len(rows)), constant_values=slots) for rows in (query_slots, key_slots)
            )
            queries, keys = (np.pad(lengths, (0, samples - len(lengths))) for lengths in (queries, keys))
            longest = [power_of_two(length) for length in longest]
        self.query_slots, self.key_slots = on_device(query_slots), on_device(key_slots)
        self.cu_q, self.cu_k = cumulative(queries), cumulative(keys)
        self.max_q, self.max_k = longest


class TwoCalls(Backend):
    """Both calls of a micro-batch; subclasses name the kernel.

    Args:
        elsewhere: bool [N], samples whose image queries a subclass attends by itself.
        fixed_shapes: S and N alone decide the shapes of all tensors, for CUDA graphs; without context parallelism.
    """

    kernel: Kernel

    def __init__(
        self,
        spans: Spans,
        batch: PackedBatch,
        cos: Tensor,
        sin: Tensor,
        elsewhere: np.ndarray | None = None,
        fixed_shapes: bool = False,
    ) -> None:
        self._cos, self._sin = cos, sin
        self._queries = slice(spans.first, spans.last)
        image_ends = np.minimum(spans.ends, spans.images)
        text_begins = np.maximum(spans.begins, spans.images)
        offset = spans.starts - spans.first
        image_queries, text_queries = image_ends - spans.begins, spans.ends - text_begins
        if elsewhere is not None:
            image_queries = np.where(elsewhere, 0, image_queries)
        self._spare = fixed_shapes
        last = (cos.device, (spans.total, len(batch.sample_starts)) if fixed_shapes else None)
        self.calls = (
            KernelCall(offset + spans.begins, image_queries, spans.starts, spans.images, False, *last),
            KernelCall(offset + text_begins, text_queries, spans.starts, spans.keys, True, *last),
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **_: Any) -> Tensor:
        if all(call.empty for call in self.calls):
            return nothing_to_attend(q, k, v)
        q, k = self.turned(q, k)
        if not self._spare:
            return self.add_calls(torch.zeros_like(q), q, k, v, scale)
        # Kernels leave rows behind the last sequence as the memory was, both ways; they stay in the spare slot.
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (q, k, v))
        return self.add_calls(torch.zeros_like(q), q, k, v, scale)[:-1]

    def turned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their rotary angles."""
        return (
            self.rotate(q, self._cos[self._queries], self._sin[self._queries]),
            self.rotate(k, self._cos, self._sin),
        )

    def add_calls(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """``out`` [Q, H, D] with the calls' rows set, from turned queries and keys."""
        for call in self.calls:
            if call.empty:
                continue
            query = q.index_select(0, call.query_slots)
            key, value = (x.index_select(0, call.key_slots) for x in (k, v))
            lengths = (call.cu_q, call.cu_k, call.max_q, call.max_k)
            attended = type(self).kernel(query, key, value, *lengths, causal=call.causal, scale=scale)
            out = out.index_copy(0, call.query_slots, attended)
        return out


def reference_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> Tensor:
    """The plain twin of the GPU kernels: one sequence after the other."""
    outputs = []
    bounds = zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)
    for q_first, q_last, k_first, k_last in bounds:
        scores = torch.einsum("qhd,khd->hqk", q[q_first:q_last], k[k_first:k_last]).float() * scale
        if causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(future.triu((k_last - k_first) - (q_last - q_first) + 1), float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1).to(v.dtype), v[k_first:k_last]))
    return torch.cat(outputs)


def _varlen_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # With fewer queries than keys its causal window is aligned to the bottom right.
    window = (-1, 0) if causal else (-1, -1)
    attended = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window)
    assert isinstance(attended, Tensor)
    return attended


@functools.cache
def _te_module(heads: int, head_dim: int, causal: bool, scale: float) -> Any:
    """Transformer Engine's attention without state of its own; queries and keys of a causal call differ in number."""
    transformer_engine = importlib.import_module("transformer_engine.pytorch")
    return transformer_engine.DotProductAttention(
        num_attention_heads=heads,
        kv_channels=head_dim,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right" if causal else "padding",
        attention_type="cross" if causal else "self",
        softmax_scale=scale,
    )


def _te_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> Tensor:
    attended = _te_module(q.shape[1], q.shape[2], causal, scale)(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_kv=max_k,
    )
    return attended.view(q.shape)


def _why_no_flash(place: Place) -> str | None:
    if place.device.type != "cuda":
        return f"needs a CUDA device, here is {place.device.type}"
    if place.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 activations (train.precision = bf16), here are {place.dtype}".replace("torch.", "")
    if place.head_dim % 8 or place.head_dim > 256:
        return f"needs heads of a multiple of 8 up to 256 channels, here are {place.head_dim}"
    capability = torch.cuda.get_device_capability(place.device)
    return None if capability >= (8, 0) else f"needs compute capability 8.0 or above, here is {capability}"


class Varlen(TwoCalls):
    """By torch's variable-length FlashAttention."""

    kernel = staticmethod(_varlen_kernel)

    @staticmethod
    def why_not(place: Place) -> str | None:
        return _why_no_flash(place)


class TransformerEngine(TwoCalls):
    """By Transformer Engine's fused attention, in bfloat16."""

    kernel = staticmethod(_te_kernel)

    @staticmethod
    def why_not(place: Place) -> str | None:
        return why_no_engine() or _why_no_flash(place)
