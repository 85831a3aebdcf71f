"""LayerScale and DropPath as Megatron-Core bias-dropout-add modules, and the layer that feeds them.

A branch's output becomes ``residual + drop * scale * (output + bias)``: ``scale`` is the learned vector of
LayerScale, ``drop`` the DropPath factor of the token's sample, 0 or 1 / (1 - rate). The factors travel with the
batch (``PackedBatch.drop_path``), so that recomputation and every layout see the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from genlip_megatron.model.fusion import compiled, scaled_residual


class ScaledResidual(torch.nn.Module):
    """``bias_dropout_add`` of one residual branch.

    Args:
        hidden_size: width D.
        init: initial value of LayerScale; 0 leaves LayerScale out.
        sequence_parallel: whether the module sees a tensor-parallel shard of the tokens, so that its gradient must
            be summed over the tensor-parallel group.
        fusion: compile the branch into one kernel each way.
    """

    def __init__(
        self, hidden_size: int, init: float, sequence_parallel: bool, dtype: torch.dtype, fusion: bool = False
    ) -> None:
        super().__init__()
        self._function = compiled(scaled_residual) if fusion else scaled_residual
        self.drop_path: Tensor | None = None  # [S_local, 1, 1], set by GenLIPLayer before each call
        self.scale: torch.nn.Parameter | None = None
        if init:
            self.scale = torch.nn.Parameter(torch.full((hidden_size,), init, dtype=dtype))
            self.scale.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """The function that Megatron-Core calls with ((output, bias), residual, dropout probability)."""
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, _: float) -> Tensor:
        branch, bias = output_with_bias
        return self._function(branch, bias, residual, self.scale, self.drop_path)


class GenLIPLayer(TransformerLayer):
    """Megatron-Core's layer, which hands each residual branch the DropPath factors of the micro-batch at hand."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As ``TransformerLayer.forward``; ``packed_seq_params`` must be a ``PackedAttention``."""
        drop_path = kwargs["packed_seq_params"].drop_path
        layer = self.layer_number - 1
        self.self_attn_bda.drop_path = None if drop_path is None else drop_path[layer, 0]
        self.mlp_bda.drop_path = None if drop_path is None else drop_path[layer, 1]
        return super().forward(*args, **kwargs)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As ``TransformerLayer``'s, without the pickled FP8 scales of Transformer Engine's modules.

        Checkpoints hold no code, and scales are found anew within a few steps.
        """
        state = super().sharded_state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.endswith("._extra_state")}
