"""Prefix-LM attention as two calls of a variable-length kernel.

The first call attends image queries over their image. The second attends text queries over their whole sample, causal
and aligned to the bottom right. Each query gets all its keys in one call, so no outputs are merged by softmax weights.
Queries are split in two and outputs joined, each row once; image keys and values are gathered. The text call reads keys
and values in place, since samples lie end to end.

``varlen.py`` and ``te.py`` are such backends: each is a kernel and a check.

Legend: S slots of the micro-batch, Q slots with queries, N samples, H local heads, D channels of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genlip_megatron.batch import PackedBatch, power_of_two
from genlip_megatron.device import to_device
from genlip_megatron.model.attention.backend import Backend, Spans, nothing_to_attend, padding_slots
from genlip_megatron.model.attention.rows import Rows, merge_rows, split_rows

# Padding attends to itself in pieces of at least this many slots, or of the longest text.
PADDING_PIECE = 128


@dataclass(frozen=True)
class Sequences:
    """The sequences of one kernel call, on the host; arrays int64 [sequences].

    Attributes:
        query_begins, queries: index of the first query among the rank's queries, and number of queries.
        key_begins, keys: the same for keys, among all slots. ``key_begins`` None: the keys are all slots, in order.
    """

    query_begins: np.ndarray
    queries: np.ndarray
    key_begins: np.ndarray | None
    keys: np.ndarray


class KernelCall:
    """One kernel call over the sequences that have queries, with its tensors on the device.

    Args:
        fixed: (slots, sequences) of every call, for CUDA graphs. Rows after the last sequence are padding. More
            sequences, which are rare, are rounded up to a power of two.
    """

    def __init__(
        self, sequences: Sequences, causal: bool, device: torch.device, fixed: tuple[int, int] | None = None
    ) -> None:
        used = sequences.queries > 0
        queries, keys, key_begins = sequences.queries[used], sequences.keys[used], sequences.key_begins
        query_slots = ranges(sequences.query_begins[used], queries)
        key_slots = None if key_begins is None else ranges(key_begins[used], keys)
        self.empty, self.causal = not used.any(), causal
        self.max_q, self.max_k = (int(lengths.max(initial=0)) for lengths in (queries, keys))
        rows = None
        if fixed is not None:
            rows, samples = fixed
            unused = max(samples, power_of_two(len(queries))) - len(queries)
            queries, keys = (np.pad(lengths, (0, unused)) for lengths in (queries, keys))
            self.max_q, self.max_k = (power_of_two(max(most, PADDING_PIECE)) for most in (self.max_q, self.max_k))

        def cumulative(lengths: np.ndarray) -> Tensor:
            return to_device(torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)), device)

        self.queries = Rows.of(query_slots, device, rows)
        self.keys = None if key_slots is None else Rows.of(key_slots, device, rows)
        self.cu_q, self.cu_k = cumulative(queries), cumulative(keys)

    def keys_of(self, x: Tensor) -> Tensor:
        """The rows of keys or values [S, H, D] that the call takes."""
        return x if self.keys is None else split_rows(x, [self.keys])[0]


class TwoCalls(Backend):
    """Both calls of a micro-batch; a subclass names the kernel.

    Args:
        elsewhere: bool [N], samples whose image queries the subclass attends itself.
        fixed_shapes: the shapes of all tensors follow from S and N only, for CUDA graphs; without context parallelism.
    """

    has_fixed_shapes = True

    def __init__(
        self,
        spans: Spans,
        batch: PackedBatch,
        cos: Tensor,
        sin: Tensor,
        elsewhere: np.ndarray | None = None,
        fixed_shapes: bool = False,
    ) -> None:
        super().__init__(spans, batch, cos, sin)
        device = cos.device
        offset = spans.starts - spans.first
        image_queries = np.minimum(spans.ends, spans.images) - spans.begins
        if elsewhere is not None:
            image_queries = np.where(elsewhere, 0, image_queries)
        text_begins = np.maximum(spans.begins, spans.images)
        image = Sequences(offset + spans.begins, image_queries, spans.starts, spans.images)
        text = Sequences(offset + text_begins, spans.ends - text_begins, spans.starts, spans.keys)
        self._padding: Tensor | None = None
        # Where every slot has a query and every sample has text, the text call's keys are all slots, in order.
        self._whole = spans.last - spans.first == spans.total and bool((text.queries > 0).all())
        if self._whole:
            text = _with_padding(text, spans)
            self._padding = (
                to_device(batch.sample_ids.cpu() < 0, device)
                if fixed_shapes
                else padding_slots(batch, 0, spans.total, device)
            )
        fixed = (spans.total, len(batch.sample_starts)) if fixed_shapes else None
        self.calls = (KernelCall(image, False, device, fixed), KernelCall(text, True, device, fixed))

    @staticmethod
    @abstractmethod
    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
    ) -> Tensor:
        """Attention of sequences laid end to end, [sum of query lengths, H, D].

        ``cu_q`` and ``cu_k`` are cumulative lengths, int32 [sequences + 1]; ``max_q`` and ``max_k`` the longest. Causal
        is aligned to the bottom right: query i of a sequence sees its keys up to ``keys - queries + i``.
        """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **_: object) -> Tensor:
        if all(call.empty for call in self.calls):
            return nothing_to_attend(q, k, v)
        return self.attend(*self.turned(q, k), v, scale)

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
            elsewhere: queries that neither call attends, and the function that attends them: [n, H, D] -> [n, H, D].
        """
        calls = [call for call in self.calls if not call.empty]
        rows = [call.queries for call in calls] + ([elsewhere[0]] if elsewhere else [])
        queries = split_rows(q, rows, self._whole)
        outputs = []
        for call, query in zip(calls, queries, strict=False):
            lengths = (call.cu_q, call.cu_k, call.max_q, call.max_k)
            key, value = call.keys_of(k), call.keys_of(v)
            outputs.append(self.kernel(query, key, value, *lengths, causal=call.causal, scale=scale))
        if elsewhere:
            outputs.append(elsewhere[1](queries[-1]))
        return merge_rows(len(q), rows, outputs, self._padding, self._whole)


def ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: ``begins[i]`` to ``begins[i] + lengths[i]``, one after the other.

    >>> ranges(np.array([3, 10]), np.array([2, 1])).tolist()
    [3, 4, 10]
    """
    offsets = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.arange(int(lengths.sum())) - offsets + np.repeat(begins, lengths)


def _with_padding(text: Sequences, spans: Spans) -> Sequences:
    """The text call over all slots. Padding slots become sequences that attend to themselves, in pieces no longer than
    the longest text. Their output is zeroed."""
    longest = max(int(text.queries.max(initial=0)), PADDING_PIECE)
    ends = spans.starts + spans.images + spans.texts
    begins = np.concatenate(([0], ends))
    lengths = np.concatenate((spans.starts, [spans.total])) - begins
    pieces = -(-lengths // longest)
    first = np.repeat(begins, pieces) + ranges(np.zeros_like(pieces), pieces) * longest
    sizes = np.minimum(np.repeat(begins + lengths, pieces) - first, longest)
    order = np.argsort(np.concatenate((spans.starts, first)), kind="stable")
    query_begins = np.concatenate((text.query_begins, first))[order]
    queries, keys = (np.concatenate((column, sizes))[order] for column in (text.queries, text.keys))
    return Sequences(query_begins, queries, None, keys)


def reference_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> Tensor:
    """A plain ``Kernel`` for tests on any machine: one sequence after the other."""
    outputs = []
    bounds = zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)
    for q_first, q_last, k_first, k_last in bounds:
        scores = torch.einsum("qhd,khd->hqk", q[q_first:q_last], k[k_first:k_last]).float() * scale
        if causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(future.triu((k_last - k_first) - (q_last - q_first) + 1), float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1).to(v.dtype), v[k_first:k_last]))
    return torch.cat(outputs)
