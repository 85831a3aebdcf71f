"""LayerScale and DropPath as a Megatron-Core bias-dropout-add module, and the layer that contains it.

A branch's output becomes ``residual + drop * scale * (output + bias)``: ``scale`` is the learned vector of
LayerScale, ``drop`` the DropPath factor of the token's sample, 0 or 1 / (1 - rate). The factors travel with the
batch (``PackedBatch.drop_path``), so that recomputation and every layout use the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from genlip_megatron.model.fp8_state import sharded_fp8_state
from genlip_megatron.model.fusion import compiled, scaled_residual, scaled_residual_and_norm
from genlip_megatron.model.norm import LayerNorm


class ScaledResidual(torch.nn.Module):
    """``bias_dropout_add`` of one residual branch.

    Args:
        init: initial value of LayerScale; 0: no LayerScale.
        sequence_parallel: the module sees a tensor-parallel shard of the tokens, so its gradient is summed over the
            group.
        fusion: compile the branch into one kernel for each pass.
    """

    def __init__(
        self, hidden_size: int, init: float, sequence_parallel: bool, dtype: torch.dtype, fusion: bool = False
    ) -> None:
        super().__init__()
        self._plain = compiled(scaled_residual) if fusion else scaled_residual
        self._with_norm = compiled(scaled_residual_and_norm) if fusion else scaled_residual_and_norm
        # The norm of the result, computed here too and handed to the norm; in a list, to keep its parameters out.
        self.following: list[LayerNorm] = []
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
        if not self.following:
            return self._plain(branch, bias, residual, self.scale, self.drop_path)
        (norm,) = self.following
        own = (norm.weight, norm.bias, norm.eps)
        out, normed = self._with_norm(branch, bias, residual, self.scale, self.drop_path, *own)
        norm.hand(out, normed)
        return out


def fuse_norms(layers: Iterable[TransformerLayer], across: bool) -> None:
    """Make each residual branch also compute the LayerNorm that follows it.

    Args:
        layers: consecutive layers, in order.
        across: a layer also computes the first norm of the next one. Must be off if layers are recomputed or gathered
            one by one.
    """
    before: TransformerLayer | None = None
    for layer in layers:
        layer.self_attn_bda.following = [layer.pre_mlp_layernorm]
        if across and before is not None:
            before.mlp_bda.following = [layer.input_layernorm]
        before = layer


class GenLIPLayer(TransformerLayer):
    """Megatron-Core's layer, which gives each residual branch the DropPath factors of the micro-batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As ``TransformerLayer.forward``; ``packed_seq_params`` must be a ``PackedAttention``."""
        drop_path = kwargs["packed_seq_params"].drop_path
        layer = self.layer_number - 1
        self.self_attn_bda.drop_path = None if drop_path is None else drop_path[layer, 0]
        self.mlp_bda.drop_path = None if drop_path is None else drop_path[layer, 1]
        return super().forward(*args, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As ``TransformerLayer``'s, with FP8 state as tensors instead of Transformer Engine's pickles."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state = {name: value for name, value in state.items() if not name.endswith("._extra_state")}
        return state | sharded_fp8_state(self, prefix, sharded_offsets)
