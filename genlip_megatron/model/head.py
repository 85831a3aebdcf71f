"""Final LayerNorm, projection and language-model head on answer rows, with a vocabulary-parallel loss.

Logits are made in chunks of rows and thrown away: the backward pass makes them again. For 16 thousand rows of the
real vocabulary they would take 10 GB in float32, for 2-3% of a step's arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from genlip_megatron.config import ModelConfig
from genlip_megatron.model.embed import padded_vocab_size
from genlip_megatron.model.norm import LayerNorm

_ROWS_PER_CHUNK = 4096


class _HeadLoss(torch.autograd.Function):
    """Cross entropy of ``softmax(x @ weight.T)`` against ``labels``, with ``weight`` split by vocabulary rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, first: int, columns: int, group: Any) -> Tensor:
        """float32 [R] losses. ``x`` [R, E]; ``weight`` [V_local, E]; the rank holds tokens first .. first + columns."""
        losses, log_sums = [], []
        for rows in range(0, x.shape[0], _ROWS_PER_CHUNK):
            logits = _local_logits(x[rows : rows + _ROWS_PER_CHUNK], weight, columns)
            top = _reduce(logits.amax(dim=-1), torch.distributed.ReduceOp.MAX, group)
            total = _reduce((logits - top[:, None]).exp_().sum(dim=-1), torch.distributed.ReduceOp.SUM, group)
            local, mine = _local_labels(labels[rows : rows + _ROWS_PER_CHUNK], first, columns)
            target = logits.gather(1, local[:, None]).squeeze(1).masked_fill(~mine, 0.0)
            target = _reduce(target, torch.distributed.ReduceOp.SUM, group)
            log_sum = top + total.log()
            losses.append(log_sum - target)
            log_sums.append(log_sum)
        ctx.save_for_backward(x, weight, labels, torch.cat(log_sums) if log_sums else x.new_zeros(0))
        ctx.first, ctx.columns, ctx.group = first, columns, group
        return torch.cat(losses) if losses else x.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        x, weight, labels, log_sums = ctx.saved_tensors
        (grad,) = grads
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, x.shape[0], _ROWS_PER_CHUNK):
            rows = slice(start, start + _ROWS_PER_CHUNK)
            logits = _local_logits(x[rows], weight, ctx.columns)
            grad_logits = (logits - log_sums[rows, None]).exp_()
            local, mine = _local_labels(labels[rows], ctx.first, ctx.columns)
            grad_logits.scatter_add_(1, local[:, None], -mine.to(grad_logits.dtype)[:, None])
            grad_logits = (grad_logits * grad[rows, None]).to(x.dtype)
            grad_x[rows] = grad_logits @ weight
            if ctx.needs_input_grad[1]:
                grad_weight += grad_logits.T @ x[rows]
        grad_x = _reduce(grad_x, torch.distributed.ReduceOp.SUM, ctx.group)
        return grad_x, grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None, None, None


def _local_logits(x: Tensor, weight: Tensor, columns: int) -> Tensor:
    """float32 [rows, V_local]; columns past the real vocabulary are minus infinity."""
    logits = F.linear(x, weight).float()
    if columns < weight.shape[0]:
        logits[:, columns:] = float("-inf")
    return logits


def _local_labels(labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """(column of the label on this rank, clamped; whether this rank holds it)."""
    local = labels - first
    mine = (local >= 0) & (local < columns)
    return local.clamp(0, max(columns - 1, 0)), mine


def _reduce(x: Tensor, operation: Any, group: Any) -> Tensor:
    if group.size() > 1:
        torch.distributed.all_reduce(x, op=operation, group=group)
    return x


class Head(MegatronModule):
    """``lm_head(proj(ln_post(x)))``: losses of answer rows in training, logits of any rows otherwise.

    All ranks of the tensor-parallel group work on the same rows, so the replicated parameters here have full
    gradients on every rank and are not marked sequence parallel.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.ln_post = LayerNorm(config, model.hidden_size, model.layernorm_epsilon, sequence_parallel=False)
        self.proj: torch.nn.Linear | None = None
        if model.text_hidden_size != model.hidden_size:
            self.proj = torch.nn.Linear(model.hidden_size, model.text_hidden_size, **options)
        rows = padded_vocab_size(model.vocab_size, tp_group.size()) // tp_group.size()
        self.weight = torch.nn.Parameter(torch.empty(rows, model.text_hidden_size, **options))
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.vocab_size = model.vocab_size
        self.first_token = rows * tp_group.rank()
        self.columns = min(max(model.vocab_size - self.first_token, 0), rows)
        if model.freeze_head:
            self.weight.requires_grad_(False)
            if self.proj is not None:
                self.proj.requires_grad_(False)

    def features(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """``ln_post`` of the given slots [R, D] (of all when None), from hidden states [S_local, 1, D]."""
        if self.config.sequence_parallel:
            # The head's backward pass already sums its input gradient over the group.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        hidden = hidden.squeeze(1)
        return self.ln_post(hidden if rows is None else hidden.index_select(0, rows))

    def forward(self, hidden: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """float32 [R]: the loss of each answer row."""
        x = self.features(hidden, rows)
        if self.proj is not None:
            x = self.proj(x)
        return _HeadLoss.apply(x, self.weight, labels, self.first_token, self.columns, self.tp_group)

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """float32 [R, V]: full logits of the given slots, gathered over the tensor-parallel group. Inference only."""
        x = self.features(hidden, rows)
        if self.proj is not None:
            x = self.proj(x)
        local = F.linear(x, self.weight).float()
        gathered = tensor_parallel.gather_from_tensor_model_parallel_region(local, group=self.tp_group)
        return gathered[:, : self.vocab_size]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Sharded tensors for a checkpoint; padded vocabulary rows may differ between layouts."""
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            state.update(
                make_sharded_tensors_for_checkpoint(
                    module.state_dict(prefix="", keep_vars=True), f"{prefix}{name}.", {}, sharded_offsets
                )
            )
        state[f"{prefix}weight"] = make_tp_sharded_tensor_for_checkpoint(
            self.weight, f"{prefix}weight", allow_shape_mismatch=True, prepend_offsets=sharded_offsets
        )
        return state
