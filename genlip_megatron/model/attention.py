"""Prefix-LM core attention over packed samples: one module, several backends, one rule (``mask.py``).

What a micro-batch's attention needs is worked out once (``PackedAttention``) and handed to every layer through
Megatron-Core's ``packed_seq_params`` argument, which recomputation passes on unchanged. Rotary positions are applied
here, from cosines computed once per micro-batch: Megatron-Core's own packed rotary path loops over samples on the
host and knows no interleaved sections.

Legend: S slots of the micro-batch, N samples, H heads of this rank, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import ModelConfig
from genlip_megatron.model.mask import prefix_lm_mask
from genlip_megatron.model.rope import apply_rotary, rotary_cos_sin, rotate_

BACKENDS = ("dense", "grouped", "varlen")

# Samples share a call while the shortest is at least this share of the longest: calls stay few, padding small.
_GROUP_FILL = 0.95


@dataclass(frozen=True)
class SampleGroup:
    """Samples of similar length, attended in one dense call of ``size`` * ``length`` rows."""

    size: int
    length: int
    slots: Tensor  # int64 [size * length]: the slot of each row; S for rows past the end of a sample
    past_end: Tensor  # int64: the rows past the end of their sample
    bias: Tensor  # [size, 1, length, length] in the activations' dtype: 0 where a query sees a key, else -inf
    cos: Tensor  # [size * length, D]
    sin: Tensor


@dataclass
class PackedAttention:
    """What one micro-batch's attention layers share. Stands in for Megatron-Core's ``PackedSeqParams``.

    ``qkv_format`` is "sbhd" so that Megatron-Core's attention leaves the tensors as they are.
    """

    cos: Tensor  # [S, D]
    sin: Tensor
    sample_ids: Tensor  # int64 [S]
    is_image: Tensor  # bool [S]
    backend: str
    drop_path: Tensor | None = None  # [L, 2, S_local, 1, 1]: factors of the residual branches' rows
    groups: list[SampleGroup] = field(default_factory=list)
    padding: Tensor | None = None  # int64: slots of no sample
    image_slots: Tensor | None = None  # int64: slots of image tokens, sample by sample
    text_slots: Tensor | None = None
    sample_slots: Tensor | None = None
    cu_image: Tensor | None = None  # int32 [N + 1]: cumulative lengths for variable-length kernels
    cu_text: Tensor | None = None
    cu_sample: Tensor | None = None
    max_image: int = 0
    max_text: int = 0
    max_sample: int = 0
    qkv_format: str = "sbhd"
    cu_seqlens_q: Any = None
    cu_seqlens_kv: Any = None


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest exact backend: variable-length FlashAttention on a GPU in half precision, else grouped SDPA."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return "varlen"
    return "grouped"


def plan_attention(
    batch: PackedBatch, config: ModelConfig, dtype: torch.dtype, backend: str | None = None
) -> PackedAttention:
    """Work out once what every layer's attention over ``batch`` needs."""
    device = batch.token_ids.device
    chosen = backend or choose_backend(device, dtype)
    if chosen not in BACKENDS:
        raise ValueError(f"attention backend {chosen!r}: allowed are {', '.join(BACKENDS)}")
    cos, sin = rotary_cos_sin(batch.position_ids, config.head_dim, config.rope_sections, config.rope_theta, dtype)
    plan = PackedAttention(cos, sin, batch.sample_ids, batch.is_image, chosen)
    if chosen == "grouped":
        _plan_groups(plan, batch)
    elif chosen == "varlen":
        _plan_varlen(plan, batch)
    return plan


def _plan_groups(plan: PackedAttention, batch: PackedBatch) -> None:
    device, slots = batch.token_ids.device, batch.num_tokens
    starts = batch.sample_starts.tolist()
    images = batch.image_lengths.tolist()
    totals = (batch.image_lengths + batch.text_lengths).tolist()
    order = sorted((i for i, total in enumerate(totals) if total), key=lambda i: -totals[i])
    members: list[list[int]] = []
    for i in order:
        if not members or totals[i] < _GROUP_FILL * totals[members[-1][0]]:
            members.append([])
        members[-1].append(i)
    for group in members:
        length = totals[group[0]]
        begin = torch.tensor([starts[i] for i in group])[:, None]
        total = torch.tensor([totals[i] for i in group])[:, None]
        prefix = torch.tensor([images[i] for i in group])[:, None, None]
        offset = torch.arange(length)
        rows = torch.where(offset < total, begin + offset, slots).flatten().to(device)
        key, query = offset[None, None, :], offset[None, :, None]
        # A real query sees real keys only: they lie before it or in its image. Padded queries are dropped.
        mask = (key < prefix) | ((query >= prefix) & (key <= query))
        bias = torch.zeros(mask.shape, dtype=plan.cos.dtype).masked_fill_(~mask, float("-inf"))[:, None]
        inside = rows.clamp(max=slots - 1)
        plan.groups.append(
            SampleGroup(
                size=len(group),
                length=length,
                slots=rows,
                past_end=(rows == slots).nonzero().squeeze(1),
                bias=bias.to(device),
                cos=plan.cos.index_select(0, inside),
                sin=plan.sin.index_select(0, inside),
            )
        )
    plan.padding = (batch.sample_ids < 0).nonzero().squeeze(1)


def _plan_varlen(plan: PackedAttention, batch: PackedBatch) -> None:
    used = batch.sample_ids >= 0
    plan.image_slots = (used & batch.is_image).nonzero().squeeze(1)
    plan.text_slots = (used & ~batch.is_image).nonzero().squeeze(1)
    plan.sample_slots = used.nonzero().squeeze(1)

    def cumulative(lengths: Tensor) -> Tensor:
        return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    totals = batch.image_lengths + batch.text_lengths
    plan.cu_image, plan.cu_text = cumulative(batch.image_lengths), cumulative(batch.text_lengths)
    plan.cu_sample = cumulative(totals)
    longest = torch.stack((batch.image_lengths.max(), batch.text_lengths.max(), totals.max())).tolist()
    plan.max_image, plan.max_text, plan.max_sample = longest


def _split(x: Tensor, plan: PackedAttention) -> tuple[Tensor, ...]:
    """The rows of ``x`` [S, ...] that each group attends over; zeros past the end of a sample."""
    rows = []
    for group in plan.groups:
        part = x.index_select(0, group.slots.clamp(max=x.shape[0] - 1))
        rows.append(part.index_fill_(0, group.past_end, 0.0) if len(group.past_end) else part)
    return tuple(rows)


def _merge(rows: Sequence[Tensor], plan: PackedAttention) -> Tensor:
    """The inverse of ``_split``; zeros at padding."""
    assert plan.padding is not None
    slots = plan.sample_ids.shape[0]
    out = rows[0].new_empty(slots + 1, *rows[0].shape[1:])  # the last row takes what lies past the end of samples
    for group, part in zip(plan.groups, rows, strict=True):
        out.index_copy_(0, group.slots, part)
    return out[:slots].index_fill_(0, plan.padding, 0.0)


class _ToGroups(torch.autograd.Function):
    """Group rows of query, key or value, turned by their rotary angles when ``rotary``.

    Gathers in both directions, no scatter-add: the same from run to run, and no more buffers than results.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: PackedAttention, rotary: bool) -> tuple[Tensor, ...]:
        ctx.plan, ctx.rotary = plan, rotary
        rows = _split(x, plan)
        if rotary:
            for group, part in zip(plan.groups, rows, strict=True):
                rotate_(part, group.cos, group.sin)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = _merge(grads, ctx.plan)
        return rotate_(grad, ctx.plan.cos, -ctx.plan.sin) if ctx.rotary else grad, None, None


class _FromGroups(torch.autograd.Function):
    """Group rows back in their slots."""

    @staticmethod
    def forward(ctx: Any, plan: PackedAttention, *rows: Tensor) -> Tensor:
        ctx.plan = plan
        return _merge(rows, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_split(grads[0], ctx.plan)


def _dense(q: Tensor, k: Tensor, v: Tensor, plan: PackedAttention, scale: float) -> Tensor:
    q, k = apply_rotary(q, plan.cos, plan.sin), apply_rotary(k, plan.cos, plan.sin)
    mask = prefix_lm_mask(plan.sample_ids, plan.is_image)
    scores = torch.einsum("qhd,khd->hqk", q, k).float() * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    weights = weights.masked_fill(~mask, 0.0)  # padding sees nothing: its softmax is over no key
    return torch.einsum("hqk,khd->qhd", weights.to(v.dtype), v)


def _grouped(q: Tensor, k: Tensor, v: Tensor, plan: PackedAttention, scale: float) -> Tensor:
    if not plan.groups:
        return torch.zeros_like(q) + 0.0 * (q + k + v)  # padding alone: nothing to attend, gradients of zero
    outputs = []
    rows = (_ToGroups.apply(q, plan, True), _ToGroups.apply(k, plan, True), _ToGroups.apply(v, plan, False))
    for group, *parts in zip(plan.groups, *rows, strict=True):
        query, key, value = (part.unflatten(0, (group.size, group.length)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=group.bias, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [size*length, H, D]
    return _FromGroups.apply(plan, *outputs)


def _varlen(q: Tensor, k: Tensor, v: Tensor, plan: PackedAttention, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert plan.image_slots is not None and plan.text_slots is not None and plan.sample_slots is not None
    assert plan.cu_image is not None and plan.cu_text is not None and plan.cu_sample is not None
    q, k = apply_rotary(q, plan.cos, plan.sin), apply_rotary(k, plan.cos, plan.sin)
    out = torch.zeros_like(q)
    if plan.max_image:
        query, key, value = (x.index_select(0, plan.image_slots) for x in (q, k, v))
        lengths = (plan.cu_image, plan.cu_image, plan.max_image, plan.max_image)
        attended = varlen_attn(query, key, value, *lengths, scale=scale)
        assert isinstance(attended, Tensor)
        out = out.index_copy(0, plan.image_slots, attended)
    if plan.max_text:
        query = q.index_select(0, plan.text_slots)
        key, value = (x.index_select(0, plan.sample_slots) for x in (k, v))
        lengths = (plan.cu_text, plan.cu_sample, plan.max_text, plan.max_sample)
        # With fewer queries than keys the causal window is aligned to the bottom right: the text after its image.
        attended = varlen_attn(query, key, value, *lengths, scale=scale, window_size=(-1, 0))
        assert isinstance(attended, Tensor)
        out = out.index_copy(0, plan.text_slots, attended)
    return out


_BACKEND_FUNCTIONS = {"dense": _dense, "grouped": _grouped, "varlen": _varlen}


class PrefixLMAttention(torch.nn.Module):
    """Core attention of Megatron-Core's ``SelfAttention``: rotary positions and exact packed prefix-LM attention."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedAttention | None = None,
    ) -> Tensor:
        """[S, 1, H*D] from query, key and value [S, 1, H, D]."""
        plan = packed_seq_params
        assert plan is not None
        attend = _BACKEND_FUNCTIONS[plan.backend]
        out = attend(query.squeeze(1), key.squeeze(1), value.squeeze(1), plan, self.scale)
        return out.flatten(1).unsqueeze(1)
