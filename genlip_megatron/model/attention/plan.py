"""What the attention layers of a micro-batch share, worked out once, and which backend does the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import ModelConfig
from genlip_megatron.device import to_device
from genlip_megatron.model.attention.backend import Backend, Place, Spans
from genlip_megatron.model.attention.dense import Dense
from genlip_megatron.model.attention.flex import Flex
from genlip_megatron.model.attention.fp8 import Fp8Images
from genlip_megatron.model.attention.grouped import Grouped
from genlip_megatron.model.attention.varlen import TransformerEngine, Varlen
from genlip_megatron.model.embed import ImageSlots
from genlip_megatron.model.fusion import compiled
from genlip_megatron.model.rope import apply_rotary, rotary_cos_sin
from genlip_megatron.parallel.sequence import slot_share

BACKENDS: dict[str, type[Backend]] = {
    "dense": Dense,
    "grouped": Grouped,
    "varlen": Varlen,
    "flex": Flex,
    "te": TransformerEngine,
}
# What train.fp8_attention takes, with a kernel of each layer's own.
FP8_BACKEND = "te-fp8"


def choose_backend(wanted: str, place: Place, transformer_engine: bool = False) -> tuple[str, str]:
    """(backend, why) for ``train.attention_backend``; auto takes the first of an order that runs.

    Args:
        wanted: a name of BACKENDS, or auto.
        place: where it is to run.
        transformer_engine: the layers are Transformer Engine's, so its attention comes first.

    Raises:
        ValueError: a wanted backend that cannot run there, with the reason and those that can.
    """
    reasons = {name: backend.why_not(place) for name, backend in BACKENDS.items()}
    if wanted != "auto":
        if wanted not in BACKENDS:
            raise ValueError(f"train.attention_backend = {wanted!r}: allowed are auto, {', '.join(BACKENDS)}")
        if reasons[wanted]:
            able = ", ".join(name for name, reason in reasons.items() if reason is None)
            raise ValueError(f"train.attention_backend = {wanted}: {reasons[wanted]}; those that run here: {able}")
        return wanted, "as set"
    order = ["te", "varlen", "grouped"] if transformer_engine else ["varlen", "te", "grouped"]
    chosen = next(name for name in order if reasons[name] is None)
    passed = [f"{name} {reasons[name]}" for name in order[: order.index(chosen)]]
    return chosen, "; ".join([f"the first of {', '.join(order)} that runs here", *passed])


@dataclass(frozen=True)
class PackedAttention:
    """What one micro-batch's layers share. Stands in for Megatron-Core's ``PackedSeqParams``, which recomputation
    passes on unchanged.

    Attributes:
        backend: attends the micro-batch's samples.
        context: context-parallel process group; None where a rank holds the whole sequence.
        gather_keys: context-parallel ranks gather keys and values instead of exchanging heads for sequence.
        drop_path: float32 [L, 2, S_local, 1, 1], factors of the residual branches' rows; None keeps everything.
        images: where the patches go of the slots that this rank holds (``embed.ImageSlots``).
        qkv_format: "sbhd", so that Megatron-Core's attention leaves the tensors as they are.
    """

    backend: Backend
    context: Any = None
    gather_keys: bool = False
    drop_path: Tensor | None = None
    images: ImageSlots | None = None
    qkv_format: str = "sbhd"
    cu_seqlens_q: Any = None
    cu_seqlens_kv: Any = None


def plan_attention(
    batch: PackedBatch,
    model: ModelConfig,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    context: Any = None,
    gather_keys: bool = False,
    fusion: bool = False,
    fixed_shapes: bool = False,
) -> PackedAttention:
    """Work out once what every layer's attention over ``batch`` needs.

    Args:
        batch: best on the CPU, where its lengths are read.
        dtype: of the activations.
        backend: a name of BACKENDS, from ``choose_backend``, or FP8_BACKEND.
        device: where attention runs.
        context: context-parallel process group, or None.
        gather_keys: with ``context``: gather keys and values (all_gather) instead of exchanging heads (a2a).
        fusion: compile rotary positions.
        fixed_shapes: as ``TwoCalls`` takes it, of which ``backend`` must be one.
    """
    positions = to_device(batch.position_ids, device)
    cos, sin = rotary_cos_sin(positions, model.head_dim, model.rope_sections, model.rope_theta, dtype)
    mine = slot_share(batch.num_tokens, context if gather_keys else None)
    spans = Spans.of(batch, mine.start, mine.stop)
    chosen = Fp8Images if backend == FP8_BACKEND else BACKENDS[backend]
    made = chosen(spans, batch, cos, sin, **({"fixed_shapes": True} if fixed_shapes else {}))
    if fusion:
        made.rotate = compiled(apply_rotary)
    return PackedAttention(made, context, gather_keys)
