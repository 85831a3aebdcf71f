"""Stand-ins for Transformer Engine on a CPU: linears with its parameter names and call signatures, contexts of FP8."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as extension
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block
from torch import Tensor

from genlip_megatron.config import RunConfig
from genlip_megatron.model import engine, specs

IN_FP8: list[bool] = [False]
SEEN: list[tuple[str, bool]] = []  # (buffer name, whether in FP8) of every forward pass of a linear


class _Engine:
    """What Transformer Engine's linears share: pickled scales as extra state."""

    ub_name: str

    def note(self) -> None:
        SEEN.append((self.ub_name, IN_FP8[-1]))

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)


class Column(_Engine, ColumnParallelLinear):
    def __init__(self, *args: Any, tp_comm_buffer_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)
        self.ub_name = tp_comm_buffer_name or ""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        self.note()
        return super().forward(x)


class LayerNormColumn(Column):
    """As ``TELayerNormColumnParallelLinear``: the norm's parameters stand before the linear's."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        config = kwargs["config"]
        super().__init__(input_size, output_size, **kwargs)
        self.eps = config.layernorm_epsilon
        own = [self._parameters.pop(name) for name in ("weight", "bias")]
        for name in ("layer_norm_weight", "layer_norm_bias"):
            parameter = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)
        self.weight, self.bias = own

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps))


class Row(_Engine, RowParallelLinear):
    def __init__(self, *args: Any, tp_comm_buffer_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)
        self.ub_name = tp_comm_buffer_name or ""

    def forward(self, x: Tensor) -> Any:
        self.note()
        return super().forward(x)


@contextlib.contextmanager
def _autocast(transformer: Any, layer: int = -1, is_init: bool = False) -> Iterator[None]:
    """As ``get_fp8_context`` with Transformer Engine."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    IN_FP8.append(IN_FP8[-1] if is_init or is_first_last_bf16_layer(transformer, layer) else True)
    yield
    IN_FP8.pop()


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Within it Transformer Engine seems to be installed, on a Hopper GPU."""
    hopper = engine.Gpu((9, 0), 91300)
    with (
        mock.patch.object(extension, "TELayerNormColumnParallelLinear", LayerNormColumn),
        mock.patch.object(extension, "TEColumnParallelLinear", Column),
        mock.patch.object(extension, "TERowParallelLinear", Row),
        mock.patch.object(specs, "why_no_engine", lambda: None),
        mock.patch.object(engine.Gpu, "here", lambda: hopper),
        mock.patch.object(transformer_block, "get_fp8_context", _autocast),
    ):
        yield


def run_engine_steps(config: RunConfig, steps: int, last: bool = True) -> dict[str, Any]:
    """As ``runs.run_steps`` with the stand-ins; ``seen``: what each linear of the first pass ran in."""
    from tests.runs import run_steps

    SEEN.clear()
    with stand_ins():
        result = run_steps(config, steps, last)
    return {**result, "seen": SEEN[: 4 * config.model.num_layers]}
