"""Megatron-Core's ``SelfAttention`` and its core attention module."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from genlip_megatron.model.attention.context import gather_sequence, heads_for_sequence, sequence_for_heads
from genlip_megatron.model.attention.fp8 import TransformerEngineImages
from genlip_megatron.model.attention.packed import PackedAttention
from genlip_megatron.model.recompute import discard, recomputable


class GenLIPSelfAttention(SelfAttention):
    """Megatron-Core's ``SelfAttention`` with an output gate that survives offloading.

    Query, key, value and gate are views of one tensor. When core attention is offloaded, Megatron-Core frees that
    tensor before the gate is applied, so the gate is copied first.

    Args:
        recompute_gate: free the gated output after its use; the backward pass recomputes it.
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
        """The input of the output projection, [S, 1, H*D], from core attention's output of that shape."""
        if not self._recompute_gate:
            return super()._apply_output_gate(x, gate)
        self._gated = recomputable(super()._apply_output_gate, x, gate)
        return self._gated

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Query, key, value and, with ``output_gate``, gate; each [S_local, 1, H, D]."""
        query, key, value, *gates = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        discard(hidden_states, query)
        # A recomputed core attention is not offloaded.
        if self.offload_core_attention and not self.checkpoint_core_attention and self.training:
            gates = [gate.clone() for gate in gates]
        return query, key, value, *gates


class PrefixLMAttention(torch.nn.Module):
    """Rotary positions and exact packed prefix-LM attention, over the rank's part of the sequence.

    Positions are applied here because Megatron-Core's packed rotary path loops over samples on the host, does not
    support interleaved sections and is wrong under context parallelism.
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
            # One per layer: delayed scaling keeps scales of the layer's values.
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
        """[S_local, 1, H*D] from query, key and value [S_local, 1, H, D] of this context-parallel rank's slots."""
        packed = packed_seq_params
        assert packed is not None
        own = {} if self.image_kernel is None else {"image_kernel": self.image_kernel}
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        if packed.context is None:
            out = packed.backend(q, k, v, self.scale, **own)
        elif packed.gather_keys:
            k, v = gather_sequence(k, packed.context), gather_sequence(v, packed.context)
            out = packed.backend(q, k, v, self.scale, **own)
        else:
            q, k, v = sequence_for_heads(q, k, v, packed.context)
            out = heads_for_sequence(packed.backend(q, k, v, self.scale, **own), packed.context)
        return out.flatten(1).unsqueeze(1)
