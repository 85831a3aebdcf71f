"""SwiGLU: ``fc2(silu(gate) * value)`` where gate and value come from one linear, all with bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from genlip_megatron.model.recompute import discard, recomputable


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * value`` for ``x = [gate, value]``; saves only ``x`` and needs few buffers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        grad = torch.empty_like(x)
        grad_gate, grad_value = grad.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grads[0] * value, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grads[0], out=grad_value)
        return grad


def _swiglu(x: Tensor, bias: Tensor | None) -> Tensor:
    """[S, 1, F] from [S, 1, 2F] and, on a GPU, a bias [2F] that has not been added yet."""
    return bias_swiglu_impl(x, bias) if x.is_cuda else _SwiGLU.apply(x)


class SwiGLU(MLP):
    """Megatron-Core's MLP with a fused activation: Megatron-Core's kernel on a GPU, ``_SwiGLU`` on a CPU.

    Args:
        recompute_act: free the activation's output after its use; the backward pass recomputes it.
    """

    def __init__(self, *args: Any, recompute_act: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recompute_act = recompute_act

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(output [S_local, 1, D], None) from [S_local, 1, D].

        The bias is added here: as a second output it would make recomputation of this module hang.
        """
        assert per_token_scale is None
        x, bias = self.linear_fc1(hidden_states)
        discard(hidden_states, x)
        if bias is not None and not x.is_cuda:
            x, bias = x + bias, None
        # One name, so that each input is freed before the next product.
        x = recomputable(_swiglu, x, bias) if self._recompute_act else _swiglu(x, bias)
        output, bias = self.linear_fc2(x)
        discard(x, output)
        return output if bias is None else output + bias, None
