"""The two calls by torch's variable-length FlashAttention. For GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from genlip_megatron.model.attention.backend import Place
from genlip_megatron.model.attention.two_calls import TwoCalls


def why_no_flash(place: Place) -> str | None:
    """Why FlashAttention cannot run at ``place``; None when it can."""
    if place.device.type != "cuda":
        return f"needs a CUDA device; this is {place.device.type}"
    if place.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 activations (train.precision = bf16), not {place.dtype}".replace("torch.", "")
    if place.head_dim % 8 or place.head_dim > 256:
        return f"needs a head size that is a multiple of 8, up to 256, not {place.head_dim}"
    major, minor = torch.cuda.get_device_capability(place.device)
    return None if major >= 8 else f"needs compute capability 8.0 or above, not {major}.{minor}"


class Varlen(TwoCalls):
    """The two calls by ``torch.nn.attention.varlen``."""

    why_not = staticmethod(why_no_flash)

    @staticmethod
    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        # With fewer queries than keys its causal window is aligned to the bottom right.
        window = (-1, 0) if causal else (-1, -1)
        attended = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window)
        assert isinstance(attended, Tensor)
        return attended
