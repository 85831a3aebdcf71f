"""Element-wise operations that ``train.fusion`` compiles into one kernel for each pass, on GPUs.

Fused are the residual branch (bias, LayerScale, DropPath, addition) and rotary positions, for the attention backends
that apply them separately. With ``norms`` the LayerNorm that reads the branch's result joins its kernel, which saves
one read. Megatron-Core compiles SwiGLU and the attention gate on every GPU. Uncompiled, the same functions run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def fusion_choice(setting: str) -> bool:
    """Whether ``train.fusion`` = ``setting`` compiles on this machine.

    Raises:
        ValueError: compile or norms without a GPU.
    """
    if setting in ("compile", "norms") and not torch.cuda.is_available():
        raise ValueError(f"train.fusion = {setting}: needs a CUDA device, and this machine has none. Use auto or none")
    return setting != "none" and torch.cuda.is_available()


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled, once for this process.

    After ``torch._dynamo.config.recompile_limit`` variants of shapes and modes torch warns and runs it uncompiled. With
    ``fullgraph`` torch would raise an error there.
    """
    return torch.compile(function)


def scaled_residual(
    branch: Tensor, bias: Tensor | None, residual: Tensor, scale: Tensor | None, drop_path: Tensor | None
) -> Tensor:
    """``residual + drop_path * scale * (branch + bias)``, without the arguments that are None.

    ``branch`` and ``residual`` are [S_local, 1, D], ``bias`` and ``scale`` [D], ``drop_path`` [S_local, 1, 1].
    """
    if bias is not None:
        branch = branch + bias
    if drop_path is not None:
        if scale is not None:
            branch = branch * scale
        return torch.addcmul(residual, branch, drop_path.to(branch.dtype))
    if scale is not None:
        return torch.addcmul(residual, branch, scale)
    return residual + branch


def scaled_residual_and_norm(
    branch: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    scale: Tensor | None,
    drop_path: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(``scaled_residual``, its LayerNorm with weight and bias [D]), both [S_local, 1, D]."""
    out = scaled_residual(branch, bias, residual, scale, drop_path)
    return out, F.layer_norm(out, norm_weight.shape, norm_weight, norm_bias, eps)
