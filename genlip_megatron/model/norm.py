"""LayerNorm that works with and without sequence parallelism, and without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm whose parameters say whether they see a tensor-parallel shard of the tokens.

    Megatron-Core sums the gradients of parameters marked ``sequence_parallel`` over the tensor-parallel group. A
    norm that ran on gathered rows must not be marked, or its gradient is multiplied.
    """

    def __init__(
        self, config: Any, hidden_size: int, eps: float = 1e-6, sequence_parallel: bool | None = None, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        sharded = config.sequence_parallel if sequence_parallel is None else sequence_parallel
        for parameter in self.parameters():
            parameter.sequence_parallel = sharded  # type: ignore[attr-defined]
