"""Prefix-LM attention as two calls of a variable-length kernel: image queries over their image, text queries, causal
and aligned to the bottom right, over their sample.

Each query gets all its keys in one call, so nothing has to be merged. What is moved for it: queries are split in two
and outputs put together, each row once, and image keys and values are taken out; the text call reads keys and values
where they are, since samples lie end to end. The kernels are torch's FlashAttention and Transformer Engine's fused
attention, both for GPUs; ``reference_kernel`` is their plain twin, for tests anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from genlip_megatron.batch import PackedBatch, power_of_two
from genlip_megatron.device import to_device
from genlip_megatron.model.attention.backend import Backend, Place, Spans, nothing_to_attend, padding_slots
from genlip_megatron.model.te_support import why_no_engine

_PIECE = 128  # slots of padding, when texts are shorter


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


@dataclass(frozen=True)
class Rows:
    """Which rows of a tensor [S, ...] something takes, none twice.

    Attributes:
        slots: int64 [n]; S for a row of no meaning.
        there: int64 [n], where they are read: ``slots``, and any row for those of no meaning.
    """

    slots: Tensor
    there: Tensor

    @classmethod
    def of(cls, slots: np.ndarray, device: torch.device, total: int | None = None) -> Rows:
        """With ``total``, filled up to so many by rows of no meaning."""
        if total is None:
            taken = to_device(torch.from_numpy(slots), device)
            return cls(taken, taken)
        behind = (0, total - len(slots))
        written, read = np.pad(slots, behind, constant_values=total), np.pad(slots, behind)
        return cls(*(to_device(torch.from_numpy(x), device) for x in (written, read)))


class _Split(torch.autograd.Function):
    """The rows of ``x`` [S, ...] that each of ``rows`` takes; together they take none twice, so that gradients are put
    back and not added. ``all_taken``: they take every row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, all_taken: bool, *rows: Rows) -> tuple[Tensor, ...]:
        ctx.length, ctx.all_taken, ctx.rows = len(x), all_taken, rows
        return tuple(x.index_select(0, each.there) for each in rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _put_together(ctx.length, ctx.all_taken, ctx.rows, grads), *[None] * (1 + len(grads))


class _Merge(torch.autograd.Function):
    """[length, ...] with ``parts`` where ``rows`` took them from; zeros elsewhere and at ``padding`` (``_fill``)."""

    @staticmethod
    def forward(
        ctx: Any, length: int, all_given: bool, padding: Tensor, rows: Sequence[Rows], *parts: Tensor
    ) -> Tensor:
        ctx.padding, ctx.rows = padding, rows
        whole = _put_together(length, all_given, rows, parts)
        return _fill(whole, padding) if len(padding) else whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = _fill(grads[0].clone(), ctx.padding) if len(ctx.padding) else grads[0]
        return None, None, None, None, *(grad.index_select(0, each.there) for each in ctx.rows)


def _fill(x: Tensor, padding: Tensor) -> Tensor:
    """``x`` [S, ...] with zeros where ``padding`` says, by slots or as bool [S]."""
    if padding.dtype == torch.bool:
        return x.masked_fill_(padding.view(-1, *[1] * (x.ndim - 1)), 0.0)
    return x.index_fill_(0, padding, 0.0)


def _put_together(length: int, all_given: bool, rows: Sequence[Rows], parts: Sequence[Tensor]) -> Tensor:
    """[length, ...] with each of ``parts`` where ``rows`` say, and zeros where none is."""
    shape = (length + 1, *parts[0].shape[1:])  # the last for rows of no meaning
    whole = parts[0].new_empty(shape) if all_given else parts[0].new_zeros(shape)
    for each, part in zip(rows, parts, strict=True):
        whole.index_copy_(0, each.slots, part)
    return whole[:length]


class KernelCall:
    """One kernel call over the sequences whose ``queries`` are not 0.

    Args:
        query_begins, queries: slot of a sequence's first query among those at hand, and their number; int64.
        key_begins, keys: the same of its keys, among all slots. With None they are all slots, in order.
        causal: as ``Kernel`` takes it.
        fixed: (slots S, samples N): tensors then have S rows, of which those behind the last sequence's mean nothing,
            and N sequences, the last ones of no length; more samples are rounded up to a power of two.
    """

    def __init__(
        self,
        query_begins: np.ndarray,
        queries: np.ndarray,
        key_begins: np.ndarray | None,
        keys: np.ndarray,
        causal: bool,
        device: torch.device,
        fixed: tuple[int, int] | None,
    ) -> None:
        used = queries > 0
        query_slots = _ranges(query_begins[used], queries[used])
        key_slots = None if key_begins is None else _ranges(key_begins[used], keys[used])
        queries, keys = queries[used], keys[used]
        self.empty, self.causal = not used.any(), causal
        longest = [int(lengths.max(initial=0)) for lengths in (queries, keys)]
        if fixed is not None:
            more = max(fixed[1], power_of_two(len(queries))) - len(queries)
            queries, keys = (np.pad(lengths, (0, more)) for lengths in (queries, keys))
            longest = [power_of_two(max(length, _PIECE)) for length in longest]

        def cumulative(lengths: np.ndarray) -> Tensor:
            numbers = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
            return to_device(torch.from_numpy(numbers), device)

        total = None if fixed is None else fixed[0]
        self.queries = Rows.of(query_slots, device, total)
        self.keys = None if key_slots is None else Rows.of(key_slots, device, total)
        self.cu_q, self.cu_k = cumulative(queries), cumulative(keys)
        self.max_q, self.max_k = longest

    def keys_of(self, x: Tensor) -> Tensor:
        """The rows of keys or values [S, H, D] that the call is given."""
        if self.keys is None:
            return x
        (taken,) = _Split.apply(x, False, self.keys)
        assert isinstance(taken, Tensor)
        return taken


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
        device, fixed = cos.device, (spans.total, len(batch.sample_starts)) if fixed_shapes else None
        begins, queries, keys = offset + text_begins, text_queries, spans.keys
        key_begins: np.ndarray | None = spans.starts
        self._padding = to_device(torch.zeros(0, dtype=torch.int64), device)
        # Where every slot is a query's, and every sample has text, its keys are all slots as they lie.
        self._whole = spans.last - spans.first == spans.total and bool((text_queries > 0).all())
        if self._whole:
            self._padding = (
                to_device(batch.sample_ids.cpu() < 0, device)
                if fixed_shapes
                else padding_slots(batch, 0, spans.total, device)
            )
            # Padding attends to itself, in short pieces.
            gaps, lengths = _gaps(spans, max(int(text_queries.max(initial=0)), _PIECE))
            order = np.argsort(np.concatenate((spans.starts, gaps)), kind="stable")
            begins = np.concatenate((begins, gaps))[order]
            queries, keys = (np.concatenate((column, lengths))[order] for column in (queries, keys))
            key_begins = None
        self.calls = (
            KernelCall(offset + spans.begins, image_queries, spans.starts, spans.images, False, device, fixed),
            KernelCall(begins, queries, key_begins, keys, True, device, fixed),
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **_: Any) -> Tensor:
        if all(call.empty for call in self.calls):
            return nothing_to_attend(q, k, v)
        return self.attend(*self.turned(q, k), v, scale)

    def turned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their rotary angles."""
        return (
            self.rotate(q, self._cos[self._queries], self._sin[self._queries]),
            self.rotate(k, self._cos, self._sin),
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        elsewhere: tuple[Rows, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """[Q, H, D] from turned queries and keys, and values.

        Args:
            elsewhere: queries that no call attends, and what does: [n, H, D] from these queries.
        """
        calls = [call for call in self.calls if not call.empty]
        rows = [call.queries for call in calls] + ([elsewhere[0]] if elsewhere else [])
        queries = _Split.apply(q, self._whole, *rows)
        outputs = []
        for call, query in zip(calls, queries, strict=False):
            lengths = (call.cu_q, call.cu_k, call.max_q, call.max_k)
            key, value = call.keys_of(k), call.keys_of(v)
            outputs.append(type(self).kernel(query, key, value, *lengths, causal=call.causal, scale=scale))
        if elsewhere:
            outputs.append(elsewhere[1](queries[-1]))
        merged: Tensor = _Merge.apply(len(q), self._whole, self._padding, rows, *outputs)
        return merged


def _gaps(spans: Spans, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(first slots, lengths) of the slots of no sample, in pieces of at most ``longest``; int64."""
    ends = spans.starts + spans.images + spans.texts
    begins = np.concatenate(([0], ends))
    lengths = np.concatenate((spans.starts, [spans.total])) - begins
    pieces = -(-lengths // longest)
    number = _ranges(np.zeros_like(pieces), pieces)  # of a piece within its gap
    first = np.repeat(begins, pieces) + number * longest
    return first, np.minimum(np.repeat(begins + lengths, pieces) - first, longest)


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


def in_bf16() -> contextlib.AbstractContextManager[None]:
    """Within it Transformer Engine computes in the tensors' own dtype."""
    context: contextlib.AbstractContextManager[None]
    context = importlib.import_module("transformer_engine.pytorch").fp8_autocast(enabled=False)
    return context


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
    # Within FP8 linears' context it would take part in their exchange of largest values, on the ranks that call it.
    with in_bf16():
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
