"""LayerNorm that works with and without sequence parallelism, and without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genlip_megatron.model.recompute import recomputable


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm; marks its parameters ``sequence_parallel`` if it sees only a shard of the tokens.

    Megatron-Core sums the gradients of marked parameters over the tensor-parallel group. A norm of gathered rows must
    not be marked, or its gradient is multiplied.

    A fused kernel that has already computed the norm passes it with ``hand``; the next call returns it.

    Args:
        recompute: the module that reads the norm may free it until the backward pass (``recompute.discard``).
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-6,
        sequence_parallel: bool | None = None,
        recompute: bool = False,
        **_: Any,
    ) -> None:
        self._recompute = recompute
        self._handed: tuple[Tensor, Tensor] | None = None
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        sharded = config.sequence_parallel if sequence_parallel is None else sequence_parallel
        for parameter in self.parameters():
            parameter.sequence_parallel = sharded  # type: ignore[attr-defined]

    def hand(self, x: Tensor, normed: Tensor) -> None:
        """Make the next call return ``normed``, if its input is the tensor ``x``."""
        self._handed = x, normed

    def forward(self, x: Tensor) -> Tensor:
        """The norm of ``x`` [..., D]."""
        handed, self._handed = self._handed, None
        if handed is not None and handed[0] is x:
            return handed[1]
        return recomputable(super().forward, x) if self._recompute else super().forward(x)
