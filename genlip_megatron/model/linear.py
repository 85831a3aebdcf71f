"""Megatron-Core's column- and row-parallel linears, with a shortcut on one tensor-parallel rank.

There torch's linear adds the bias inside the matrix product, where Megatron-Core needs another pass over the output.
With Apex's fused gradient accumulation Megatron-Core's path stays.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


class _AddsBias(torch.nn.Module):
    def forward(self: Any, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(output [S, 1, out / T], bias or None if it has been added) from [S_local, 1, in]."""
        if self.tp_group.size() == 1 and not self.gradient_accumulation_fusion:
            return F.linear(input_, self.weight, self.bias), None
        return super().forward(input_, *args, **kwargs)


class ColumnLinear(_AddsBias, ColumnParallelLinear):
    """As ``ColumnParallelLinear``; returns no bias if it has added it already."""


class RowLinear(_AddsBias, RowParallelLinear):
    """As ``RowParallelLinear``; returns no bias if it has added it already."""
