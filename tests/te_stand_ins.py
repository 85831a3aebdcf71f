"""Stand-ins for Transformer Engine on a CPU: linears with its parameter names and call signatures, and FP8 contexts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as extension
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.parallel_state import get_amax_reduction_group
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block
from torch import Tensor

from genlip_megatron.config import RunConfig
from genlip_megatron.model import fp8_state, specs, te_support
from genlip_megatron.testing.runs import run_steps

HISTORY = 8  # passes that delayed scaling remembers
IN_FP8: list[bool] = [False]
SEEN: list[tuple[str, bool]] = []  # (buffer name, whether in FP8) of every forward pass of a linear


class _Scaling:
    """As ``DelayedScalingRecipeState``, for a number of tensors."""

    def __init__(self, tensors: int) -> None:
        self.scale, self.amax_history = torch.ones(tensors), torch.zeros(HISTORY, tensors)

    def quantised(self, x: Tensor) -> Tensor:
        """``x`` rounded to E4M3 with the scale from earlier passes; records the largest value in the history."""
        amax = self.amax_history[0, :1]  # local to the rank until the next update
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, get_amax_reduction_group(True))
        if amax:
            self.amax_history.copy_(self.amax_history.roll(-1, 0))
            self.scale[0] = 448 / self.amax_history[:, 0].max()
        self.amax_history[0] = 0.0
        self.amax_history[0, 0] = x.abs().max()
        return ((x * self.scale[0]).clamp(-448, 448).to(torch.float8_e4m3fn).to(x) / self.scale[0]).to(x)


class _InFp8(torch.autograd.Function):
    """Quantises a tensor with one scaling and its gradient with another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, meta: dict[str, _Scaling]) -> Tensor:
        ctx.meta = meta
        return meta["scaling_fwd"].quantised(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.meta["scaling_bwd"].quantised(grad), None


class _Engine(torch.nn.Module):
    """The common part of Transformer Engine's linears: FP8 format, and pickled state of delayed scaling."""

    def __init__(self, *args: Any, tp_comm_buffer_name: str, **kwargs: Any) -> None:
        super().__init__(*args, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)
        self.ub_name, self.fp8_meta = tp_comm_buffer_name, {}

    def init_fp8_metadata(self) -> None:
        if IN_FP8[-1] and self.config.fp8_recipe == "delayed" and not self.fp8_meta:
            self.fp8_meta.update(scaling_fwd=_Scaling(3), scaling_bwd=_Scaling(2))

    def forward(self, x: Tensor) -> Any:
        SEEN.append((self.ub_name, IN_FP8[-1]))
        self.init_fp8_metadata()
        return super().forward(_InFp8.apply(x, self.fp8_meta) if IN_FP8[-1] and self.fp8_meta else x)

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)


class Column(_Engine, ColumnParallelLinear):
    """As ``TEColumnParallelLinear``."""


class LayerNormColumn(Column):
    """As ``TELayerNormColumnParallelLinear``: the norm's parameters come before the linear's."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)
        config = kwargs["config"]
        self.eps = config.layernorm_epsilon
        own = [self._parameters.pop(name) for name in ("weight", "bias")]
        for name in ("layer_norm_weight", "layer_norm_bias"):
            parameter = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)
        self.weight, self.bias = own

    def forward(self, x: Tensor) -> Any:
        return super().forward(F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps))


class Row(_Engine, RowParallelLinear):
    """As ``TERowParallelLinear``."""


@contextlib.contextmanager
def _autocast(transformer: Any, layer: int = -1, is_init: bool = False) -> Iterator[None]:
    """Megatron-Core's ``get_fp8_context`` as it behaves with Transformer Engine."""
    IN_FP8.append(IN_FP8[-1] if is_init or is_first_last_bf16_layer(transformer, layer) else True)
    yield
    IN_FP8.pop()


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Inside the block Transformer Engine seems to be installed, on a Hopper GPU."""
    hopper = te_support.Gpu((9, 0), 91300)
    with (
        mock.patch.object(extension, "TELayerNormColumnParallelLinear", LayerNormColumn),
        mock.patch.object(extension, "TEColumnParallelLinear", Column),
        mock.patch.object(extension, "TERowParallelLinear", Row),
        mock.patch.object(specs, "why_no_engine", lambda: None),
        mock.patch.object(te_support.Gpu, "here", lambda: hopper),
        mock.patch.object(transformer_block, "get_fp8_context", _autocast),
        mock.patch.object(fp8_state, "get_fp8_context", _autocast),
    ):
        yield


def run_engine_steps(config: RunConfig, steps: int, last: bool = True) -> dict[str, Any]:
    """``runs.run_steps`` with the stand-ins; ``seen``: (linear, whether in FP8) of the first pass."""
    SEEN.clear()
    with stand_ins():
        result = run_steps(config, steps, last)
    return {**result, "seen": SEEN[: 4 * config.model.num_layers]}
