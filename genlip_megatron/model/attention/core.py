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
        gate_rows: rows of each head's gate: its channels, 1, or 0 without a gate.
    """

    def __init__(self, *args: Any, recompute_gate: bool = False, gate_rows: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recompute_gate, self._gate_rows = recompute_gate, gate_rows
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
        apply = super()._apply_output_gate if self._gate_rows > 1 else gate_heads
        if not self._recompute_gate:
            return apply(x, gate)
        self._gated = recomputable(apply, x, gate)
        return self._gated

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Query, key, value [S_local, 1, H, D] and, with an output gate, gate [S_local, 1, H, D or 1]."""
        if self._gate_rows == 1:
            query, key, value, *gates = self._with_headwise_gate(hidden_states)
        else:
            query, key, value, *gates = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        discard(hidden_states, query)
        # A recomputed core attention is not offloaded.
        if self.offload_core_attention and not self.checkpoint_core_attention and self.training:
            gates = [gate.clone() for gate in gates]
        return query, key, value, *gates

    def _with_headwise_gate(self, hidden_states: Tensor) -> list[Tensor]:
        """Query, key, value and gate [S, 1, H, D or 1]; Megatron-Core splits only gates of D channels."""
        projected, _ = self.linear_qkv(hidden_states)
        width = self.hidden_size_per_attention_head
        heads = projected.unflatten(2, (-1, 3 * width + 1))
        query, gate, key, value = heads.split((width, 1, width, width), dim=3)
        # Attention kernels need aligned rows, which an odd number of channels between heads does not give.
        return [query.contiguous(), key.contiguous(), value.contiguous(), gate]


def gate_heads(x: Tensor, gate: Tensor) -> Tensor:
    """``x`` [S, 1, H*D] times the sigmoid of ``gate`` [S, 1, H, 1]."""
    return (x.unflatten(2, (gate.shape[2], -1)) * gate.float().sigmoid()).to(x.dtype).flatten(2)


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
