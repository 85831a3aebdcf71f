"""Megatron-Core's ``SelfAttention`` and its core attention module."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from genlip_megatron.model.attention.context import gather_sequence, heads_for_sequence, sequence_for_heads
from genlip_megatron.model.attention.fp8 import TransformerEngineImages
from genlip_megatron.model.attention.plan import PackedAttention
from genlip_megatron.model.recompute import discard, recomputable


class GenLIPSelfAttention(SelfAttention):
    """Megatron-Core's, with an output gate that stays when queries, keys and values are moved to host memory.

    They are views of one tensor, whose memory Megatron-Core then frees while the gate is still to be applied.

    Args:
        recompute_gate: keep no gated output of core attention for the backward pass, which makes it again.
    """

    def __init__(self, *args: Any, recompute_gate: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recompute_gate = recompute_gate
        self._gated: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(output [S_local, 1, D], bias or None), as ``SelfAttention.forward``."""
        output, bias = super().forward(*args, **kwargs)
        gated, self._gated = self._gated, None
        if gated is not None:
            discard(gated, output)
        return output, bias

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """What the output projection is given, [S, 1, H*D], from core attention's output of that shape."""
        if not self._recompute_gate:
            return super()._apply_output_gate(x, gate)
        self._gated = recomputable(super()._apply_output_gate, x, gate)
        return self._gated

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Query, key, value and, with ``output_gate``, gate; each [S_local, 1, H, D]."""
        query, key, value, *gates = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        discard(hidden_states, query)
        # Where core attention is recomputed, nothing of it is moved.
        if self.offload_core_attention and not self.checkpoint_core_attention and self.training:
            gates = [gate.clone() for gate in gates]
        return query, key, value, *gates


class PrefixLMAttention(torch.nn.Module):
    """Rotary positions and exact packed prefix-LM attention, over whatever share of the sequence the rank holds.

    Megatron-Core's own packed rotary path loops over samples on the host, knows no interleaved sections and is wrong
    under context parallelism, so positions are applied here.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.image_kernel: TransformerEngineImages | None = None
        if config.fp8_dot_product_attention:
            heads = config.num_attention_heads // pg_collection.tp.size()
            if cp_comm_type == "a2a":
                heads //= pg_collection.cp.size()
            # A layer's own, since delayed scaling keeps scales of its values.
            self.image_kernel = TransformerEngineImages(heads, config.kv_channels, self.scale)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedAttention | None = None,
    ) -> Tensor:
        """[S_local, 1, H*D] from query, key and value [S_local, 1, H, D]; S_local is a context-parallel share."""
        plan = packed_seq_params
        assert plan is not None
        own = {} if self.image_kernel is None else {"image_kernel": self.image_kernel}
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        if plan.context is None:
            out = plan.backend(q, k, v, self.scale, **own)
        elif plan.gather_keys:
            k, v = gather_sequence(k, plan.context), gather_sequence(v, plan.context)
            out = plan.backend(q, k, v, self.scale, **own)
        else:
            q, k, v = sequence_for_heads(q, k, v, plan.context)
            out = heads_for_sequence(plan.backend(q, k, v, self.scale, **own), plan.context)
        return out.flatten(1).unsqueeze(1)
