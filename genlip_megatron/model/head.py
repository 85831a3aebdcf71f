"""Final LayerNorm, projection and language-model head on answer rows, with a vocabulary-parallel loss.

Logits are computed in chunks of rows, each chunk's gradient together with its loss. Keeping the logits of 16 thousand
rows of the real vocabulary would take 5 GB in bfloat16; recomputing them, a quarter of the head's arithmetic. One
buffer serves all chunks: first logits, then their gradient.

So the forward pass computes the weight's gradient too. It adds it to the float32 buffer of Megatron-Core's
DistributedDataParallel (``main_grad``) at once, which saves a matrix of 0.9 GB at E = 1536. This assumes that the
backward pass multiplies the loss by 1, which holds: ``calculate_per_token_loss`` divides by the tokens after the last
micro-batch, and there is no loss scale. Any other factor turns the gradient into NaN, and the step's verdict skips the
update. Without such a buffer (FSDP, a bare module) the gradient waits for its factor.
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
from genlip_megatron.model.cross_entropy import add_product_, chunk_rows, cross_entropy_
from genlip_megatron.model.norm import LayerNorm
from genlip_megatron.model.state_dict import has_projections, padded_vocab_size
from genlip_megatron.parallel.sequence import slot_share


class _HeadLoss(torch.autograd.Function):
    """Weighted sum of the cross entropies of ``softmax(x @ weight.T)``, with ``weight`` split by vocabulary rows.

    The rows of a sum share one gradient factor, so the forward pass computes the gradients and the backward pass only
    scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        row_weights: Tensor,
        first: int,
        columns: int,
        group: Any,
        with_gradient: bool,
    ) -> Tensor:
        """float32 scalar from x [R, E], weight [V_local, E] of the tokens from ``first`` to ``first + columns``, labels
        int64 [R] and row weights float32 [R]."""
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        trained = with_gradient and weight.requires_grad
        ctx.main_grad = getattr(weight, "main_grad", None) if trained else None
        own = torch.zeros_like(weight, dtype=torch.float32) if trained and ctx.main_grad is None else None
        grad_weight = own if ctx.main_grad is None else ctx.main_grad
        grad_x = torch.empty_like(x) if with_gradient else None
        chunk = min(chunk_rows(len(x), len(weight), x.device.type, x.element_size()), len(x))
        logits = x.new_empty(chunk, len(weight))
        for start in range(0, len(x), max(chunk, 1)):
            rows = slice(start, min(start + chunk, len(x)))
            part = logits[: rows.stop - start]
            torch.mm(x[rows], weight.T, out=part)
            losses = cross_entropy_(part, labels[rows] - first, row_weights[rows], columns, group, with_gradient)
            total += (losses * row_weights[rows]).sum()
            if grad_x is not None:
                torch.mm(part, weight, out=grad_x[rows])
            if grad_weight is not None:
                add_product_(grad_weight, part, x[rows])
        ctx.group, ctx.weight = group, weight
        ctx.save_for_backward(grad_x, None if own is None else own.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        grad_x = grad_x * grads[0].to(grad_x.dtype)
        if ctx.group.size() > 1:
            torch.distributed.all_reduce(grad_x, group=ctx.group)
        if grad_weight is not None:
            grad_weight = grad_weight * grads[0].to(grad_weight.dtype)
        elif ctx.main_grad is not None:
            wrong = torch.where(grads[0] == 1, 0.0, float("nan"))
            ctx.main_grad.view(-1)[:1].add_(wrong)
            # As Megatron-Core's linears with fused accumulation: DDP's hook needs any gradient and drops it.
            ctx.weight.grad_added_to_main_grad = True
            grad_weight = ctx.weight.detach()
        return grad_x, grad_weight, *[None] * 6


class Head(MegatronModule):
    """``lm_head(proj(ln_post(x)))``: the loss of answer rows in training, logits of any rows otherwise.

    All tensor-parallel ranks work on the same rows, so replicated parameters have full gradients on every rank and are
    not marked ``sequence_parallel``. Context-parallel ranks share the rows equally, wherever they are in the sequence:
    otherwise only the few ranks with text slots would compute the head.

    Args:
        context: context-parallel group; None when its ranks do not share the sequence.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, tp_group: Any, context: Any = None) -> None:
        super().__init__(config=config)
        self.tp_group, self.context = tp_group, context
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.ln_post = LayerNorm(config, model.hidden_size, model.layernorm_epsilon, sequence_parallel=False)
        self.proj: torch.nn.Linear | None = None
        if has_projections(model):
            self.proj = torch.nn.Linear(model.hidden_size, model.text_hidden_size, **options)
        rows = padded_vocab_size(model.vocab_size, tp_group.size()) // tp_group.size()
        self.weight = torch.nn.Parameter(torch.empty(rows, model.text_hidden_size, **options))
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.vocab_size = model.vocab_size
        self.first_token = rows * tp_group.rank()
        self.columns = min(max(model.vocab_size - self.first_token, 0), rows)

    def _rows(self, hidden: Tensor, rows: Tensor | None) -> Tensor:
        """Hidden states [R / C, D] of this context-parallel rank's share of ``rows`` (None: all slots), from the hidden
        states [S_local, 1, D] of this rank's slots."""
        if self.config.sequence_parallel:
            # The head's backward pass already sums its input gradient over the group.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        hidden = hidden.squeeze(1)
        if rows is None:
            return hidden
        if self.context is None:
            return hidden.index_select(0, rows)
        # Each rank contributes the rows it holds and zeros for the others, and receives its share of the sum.
        rows = self._padded(rows)
        local = rows - self.context.rank() * hidden.shape[0]
        elsewhere = (local < 0) | (local >= hidden.shape[0])
        held = hidden.index_select(0, local.clamp(0, hidden.shape[0] - 1)).masked_fill(elsewhere[:, None], 0.0)
        return tensor_parallel.reduce_scatter_to_sequence_parallel_region(held, group=self.context)

    def _padded(self, x: Tensor) -> Tensor:
        """``x`` [R, ...] padded with zeros to a multiple of the context-parallel size."""
        return F.pad(x, (0, -x.shape[0] % self.context.size()))

    def _share(self, x: Tensor) -> Tensor:
        """This context-parallel rank's part of ``x`` [R]."""
        if self.context is None:
            return x
        x = self._padded(x)
        return x[slot_share(x.shape[0], self.context)]

    def features(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """``ln_post`` of the given slots (None: all), [R, D], the same on every rank. For inference only."""
        x = self.ln_post(self._rows(hidden, rows))
        if self.context is not None:
            x = tensor_parallel.gather_from_sequence_parallel_region(x, group=self.context)
        return x if rows is None else x[: len(rows)]

    def forward(self, hidden: Tensor, rows: Tensor, labels: Tensor, row_weights: Tensor) -> Tensor:
        """float32 scalar: the weighted sum of the losses of this context-parallel rank's share of the answer rows.

        Args:
            hidden: [S_local, 1, D] of this rank's slots.
            rows, labels: int64 [R], slots of the micro-batch and the tokens that they predict.
            row_weights: float32 [R].
        """
        x = self.ln_post(self._rows(hidden, rows))
        if self.proj is not None:
            x = self.proj(x)
        labels, row_weights = self._share(labels), self._share(row_weights)
        return _HeadLoss.apply(
            x, self.weight, labels, row_weights, self.first_token, self.columns, self.tp_group, torch.is_grad_enabled()
        )

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """float32 [R, V]: full logits of the given slots (None: all), the same on every rank. For inference only."""
        x = self.features(hidden, rows)
        if self.proj is not None:
            x = self.proj(x)
        local = F.linear(x, self.weight).float()
        gathered = tensor_parallel.gather_from_tensor_model_parallel_region(local, group=self.tp_group)
        # Contiguous, since a collective may follow.
        return gathered[:, : self.vocab_size].contiguous()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Sharded tensors for a checkpoint; padded vocabulary rows may differ between layouts."""
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            own = module.state_dict(prefix="", keep_vars=True)
            state |= make_sharded_tensors_for_checkpoint(own, f"{prefix}{name}.", {}, sharded_offsets)
        state[f"{prefix}weight"] = make_tp_sharded_tensor_for_checkpoint(
            self.weight, f"{prefix}weight", allow_shape_mismatch=True, prepend_offsets=sharded_offsets
        )
        return state
