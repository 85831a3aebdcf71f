"""Data of a micro-batch that all attention layers share, prepared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import ModelConfig
from genlip_megatron.device import to_device
from genlip_megatron.model.attention.backend import Backend, Spans
from genlip_megatron.model.attention.fp8 import Fp8Images
from genlip_megatron.model.attention.registry import BACKENDS, FP8_BACKEND
from genlip_megatron.model.embed import ImageSlots
from genlip_megatron.model.fusion import compiled
from genlip_megatron.model.rope import apply_rotary, rotary_cos_sin
from genlip_megatron.parallel.sequence import slot_share


@dataclass(frozen=True)
class PackedAttention:
    """Data of a micro-batch that the layers share. Takes the place of Megatron-Core's ``PackedSeqParams``, which
    recomputation passes on unchanged.

    Attributes:
        backend: attends the micro-batch's samples.
        context: context-parallel process group; None where a rank holds the whole sequence.
        gather_keys: context-parallel ranks gather keys and values instead of exchanging heads for sequence.
        drop_path: float32 [L, 2, S_local, 1, 1], the residual branches' factors of each slot; None keeps all branches.
        images: where the patches of this rank's slots go.
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


def prepare_attention(
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
    """Prepare the data that every layer's attention over ``batch`` shares.

    Args:
        batch: preferably on the CPU, where its lengths are read.
        backend: a name of BACKENDS, from ``choose_backend``, or FP8_BACKEND.
        context, gather_keys: as in ``PackedAttention``.
        fusion: compile rotary positions.
        fixed_shapes: for CUDA graphs; needs a backend that ``has_fixed_shapes``.
    """
    positions = to_device(batch.sequence_positions if model.positions == "1d" else batch.position_ids, device)
    chunked = model.positions == "chunked"
    cos, sin = rotary_cos_sin(positions, model.head_dim, model.rope_sections, model.rope_theta, dtype, chunked)
    own = slot_share(batch.num_tokens, context if gather_keys else None)
    spans = Spans.of(batch, own.start, own.stop)
    kind: Any = Fp8Images if backend == FP8_BACKEND else BACKENDS[backend]
    prepared: Backend = kind(spans, batch, cos, sin, **({"fixed_shapes": True} if fixed_shapes else {}))
    if fusion and kind.rotate is apply_rotary:  # "grouped" has its own
        prepared.rotate = compiled(apply_rotary)
    return PackedAttention(prepared, context, gather_keys)
