"""The two calls by Transformer Engine's fused attention, in bfloat16. For GPUs."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

from torch import Tensor

from genlip_megatron.model.attention.backend import Place
from genlip_megatron.model.attention.two_calls import TwoCalls
from genlip_megatron.model.attention.varlen import why_no_flash
from genlip_megatron.model.te_support import why_no_engine


def in_bf16() -> contextlib.AbstractContextManager[None]:
    """A context in which Transformer Engine computes in the tensors' own dtype."""
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    return engine.fp8_autocast(enabled=False)  # type: ignore[no-any-return]


@functools.cache
def _module(heads: int, head_dim: int, causal: bool, scale: float) -> Any:
    """Transformer Engine's attention, without state. The causal call is "cross": it has fewer queries than keys."""
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


class Te(TwoCalls):
    """The two calls by ``DotProductAttention``."""

    @staticmethod
    def why_not(place: Place) -> str | None:
        return why_no_engine() or why_no_flash(place)

    @staticmethod
    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
    ) -> Tensor:
        lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_k, "max_seqlen_q": max_q, "max_seqlen_kv": max_k}
        # Inside the FP8 linears' context it would join their amax reduction, but not all ranks call it.
        with in_bf16():
            attention = _module(q.shape[1], q.shape[2], causal, scale)
            attended: Tensor = attention(q.contiguous(), k.contiguous(), v.contiguous(), **lengths)
        return attended.view(q.shape)
