"""Heads of probes. N heads of one kind are trained at once: their parameters are stacked, [N, ...].

Shapes: N heads, B images, P patches, D width of the features, A attention heads, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genlip_megatron.evaluate import ranks


class BatchNorm(nn.Module):
    """BatchNorm over the first dimension, with the statistics of all ranks; ``nn.SyncBatchNorm`` needs a GPU.

    Args:
        shape: of one row.
        eps: added to the variance.
        affine: whether a trained scale and shift follow.
        momentum: weight of the newest batch in the running statistics.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, shape: Sequence[int], eps: float, affine: bool = False, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("mean", torch.zeros(*shape))
        self.register_buffer("variance", torch.ones(*shape))
        self.weight = nn.Parameter(torch.ones(*shape)) if affine else None
        self.bias = nn.Parameter(torch.zeros(*shape)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """[rows, *shape] from [rows, *shape]."""
        mean, variance = self.mean, self.variance
        if self.training:
            count = ranks.total(torch.full((), float(len(x)), device=x.device))
            mean = ranks.total(x.sum(0)) / count
            variance = ranks.total((x - mean).square().sum(0)) / count
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
        y = (x - mean) * (variance + self.eps).rsqrt()
        return y if self.weight is None or self.bias is None else y * self.weight + self.bias


class AttentiveHeads(nn.Module):
    """Attentive pooling of the patches by one learned query, then a linear classifier (AIM; CAPI).

    ``softmax(q (x K)^T / sqrt(d)) (x V)`` per attention head. With one query that does not depend on the image, K and V
    need not be applied to every patch: the scores are ``x (K^T q)``, and V follows after the average over patches. This
    takes D / A = 64 times fewer operations and the same parameters. A bias of K would add the same number to all scores
    of a query, which softmax ignores, so there is none.

    Args:
        heads: N.
        dim: D. There are A = D / 64 attention heads, or the next lower number that divides D.
        classes: C.
        token_norm: BatchNorm without scale over the patches first (AIM).
        final_norm: BatchNorm without scale over the pooled vectors (OpenCLIP's variant).
        bias: whether V and the classifier have a bias. Before ``final_norm``, which would remove it, V has none.
        truncated: initial weights are N(0, 0.02), cut at -2 and 2 (CAPI); else those of ``nn.Linear`` (AIM). The
            query is N(0, 0.02), the biases are 0.
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        classes: int,
        *,
        token_norm: bool = False,
        final_norm: bool = False,
        bias: bool = True,
        truncated: bool = True,
    ) -> None:
        super().__init__()
        self.attention_heads = next(n for n in range(max(1, dim // 64), 0, -1) if dim % n == 0)
        self.token_norm = BatchNorm((dim,), 1e-6) if token_norm else None
        self.final_norm = BatchNorm((heads, dim), 1e-5) if final_norm else None
        self.query = nn.Parameter(torch.empty(heads, dim))
        self.key = nn.Parameter(torch.empty(heads, dim, dim))  # [N, out, in], as the next two
        self.value = nn.Parameter(torch.empty(heads, dim, dim))
        self.weight = nn.Parameter(torch.empty(heads, classes, dim))
        self.value_bias = nn.Parameter(torch.zeros(heads, dim)) if bias and not final_norm else None
        self.bias = nn.Parameter(torch.zeros(heads, classes)) if bias else None
        nn.init.normal_(self.query, std=0.02)
        for weight in (self.key, self.value, self.weight):
            if truncated:
                nn.init.trunc_normal_(weight, std=0.02)
            else:
                nn.init.uniform_(weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))  # that of nn.Linear

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits [N, B, C].

        Args:
            x: [B, P, D].
            valid: bool [B, P], False for padding; None: there is none.
        """
        if self.token_norm is not None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
            normed = torch.zeros_like(x)
            normed[mask] = self.token_norm(x[mask])
            x = normed
        heads, dim = self.query.shape
        parts = (self.attention_heads, dim // self.attention_heads)
        query = self.query.unflatten(1, parts)  # [N, A, d]
        probe = torch.einsum("nad,nadi->nai", query, self.key.unflatten(1, parts)) / math.sqrt(parts[1])
        scores = torch.einsum("hi,bpi->bhp", probe.flatten(0, 1), x)  # h is N * A
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], -torch.inf)
        averages = (scores.softmax(dim=2) @ x).unflatten(1, (heads, parts[0]))  # [B, N, A, D]
        pooled = torch.einsum("bnai,nadi->bnad", averages, self.value.unflatten(1, parts)).flatten(2)  # [B, N, D]
        if self.value_bias is not None:
            pooled = pooled + self.value_bias
        if self.final_norm is not None:
            pooled = self.final_norm(pooled)
        logits = torch.einsum("bni,nci->nbc", pooled, self.weight)
        return logits if self.bias is None else logits + self.bias[:, None]


class MeanLinearHeads(nn.Module):
    """A linear classifier of the mean patch (DINOv2's linear evaluation, without a class token).

    Args:
        heads: N.
        dim: D.
        classes: C.
    """

    def __init__(self, heads: int, dim: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, classes, dim))
        self.bias = nn.Parameter(torch.zeros(heads, classes))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits [N, B, C]; arguments as ``AttentiveHeads.forward``."""
        return torch.einsum("bi,nci->nbc", mean_patch(x, valid), self.weight) + self.bias[:, None]


def mean_patch(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """[B, D], the mean over the patches [B, P, D] that are ``valid`` [B, P]."""
    if valid is None:
        return x.mean(dim=1)
    return (x * valid[..., None]).sum(dim=1) / valid.sum(dim=1, keepdim=True)


class SegmentationHead(nn.Module):
    """BatchNorm and one linear layer on each patch (DINOv2's linear segmentation).

    Args:
        dim: D.
        classes: C.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = BatchNorm((dim,), 1e-5, affine=True)
        self.linear = nn.Linear(dim, classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits [B, C, h, w] of patches [B, h * w, D]."""
        logits = self.linear(self.norm(x.flatten(0, 1)))
        return logits.unflatten(0, (len(x), *grid)).permute(0, 3, 1, 2)


class StackedOptimizer:
    """AdamW, or SGD with momentum, of stacked heads [N, ...], each with its own learning rate and weight decay.

    Args:
        heads: the module; the first dimension of each parameter is N.
        weight_decays: one for each head; biases are not decayed.
        betas: of AdamW; None: SGD with momentum 0.9.
        clip: largest norm of the gradient of one head; 0: no limit.
    """

    def __init__(
        self,
        heads: nn.Module,
        weight_decays: Sequence[float],
        betas: tuple[float, float] | None = (0.9, 0.999),
        clip: float = 0.0,
    ) -> None:
        self._named = dict(heads.named_parameters())
        self._decays, self._betas, self._clip = torch.tensor(weight_decays), betas, clip
        self.steps = 0
        self._state = {
            f"{kind}.{name}": torch.zeros_like(parameter)
            for name, parameter in self._named.items()
            for kind in (("first", "second") if betas else ("momentum",))
        }

    @property
    def parameters(self) -> list[Tensor]:
        """Those that it updates."""
        return list(self._named.values())

    def state(self) -> dict[str, Tensor]:
        """The moments or the momentum of each parameter."""
        return self._state

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from the state after ``steps`` updates."""
        for name, tensor in self._state.items():
            tensor.copy_(state[name])
        self.steps = steps

    @torch.no_grad()
    def step(self, learning_rates: Sequence[float] | Tensor) -> None:
        """Update with a learning rate for each head [N], then drop the gradients."""
        self.steps += 1
        scale = self._clip_scale() if self._clip else None
        for name, parameter in self._named.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if scale is not None:
                gradient = gradient * _per_head(scale, parameter)
            rates = _per_head(learning_rates, parameter)
            if self._betas is None:
                momentum = self._state[f"momentum.{name}"].mul_(0.9).add_(gradient)
                parameter.sub_(rates * momentum)
            else:
                slow, fast = self._betas
                first, second = self._state[f"first.{name}"], self._state[f"second.{name}"]
                first.lerp_(gradient, 1 - slow)
                second.mul_(fast).addcmul_(gradient, gradient, value=1 - fast)
                if not name.endswith("bias"):
                    parameter.mul_(1 - rates * _per_head(self._decays, parameter))
                divisor = second.sqrt().mul_((1 - fast**self.steps) ** -0.5).add_(1e-8)
                parameter.sub_((first / divisor).mul_(rates / (1 - slow**self.steps)))
            parameter.grad = None

    def _clip_scale(self) -> Tensor:
        """Factor of each head's gradient [N], at most 1."""
        gradients = [parameter.grad for parameter in self._named.values() if parameter.grad is not None]
        squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
        return (self._clip / (squares.sqrt() + 1e-6)).clamp(max=1)


class HeadAdamW:
    """torch's AdamW of one head, with the methods of ``StackedOptimizer``. It decays all parameters.

    Args:
        head: the module.
        weight_decay: of its parameters.
    """

    def __init__(self, head: nn.Module, weight_decay: float) -> None:
        self._named = dict(head.named_parameters())
        self._adamw = torch.optim.AdamW(self._named.values(), weight_decay=weight_decay)

    @property
    def parameters(self) -> list[Tensor]:
        """Those that it updates."""
        return list(self._named.values())

    def state(self) -> dict[str, Tensor]:
        """The moments of each parameter."""
        return {
            f"{kind}.{name}": self._adamw.state[parameter][kind]
            for name, parameter in self._named.items()
            for kind in ("exp_avg", "exp_avg_sq")
        }

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from the state after ``steps`` updates."""
        for name, parameter in self._named.items():
            moments = {kind: state[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq")}
            self._adamw.state[parameter] = {"step": torch.tensor(float(steps)), **moments}

    def step(self, learning_rate: float) -> None:
        """Update, then drop the gradients."""
        self._adamw.param_groups[0]["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad()


def _per_head(values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """A number for each head [N] in the shape [N, 1, ...] that multiplies ``like`` [N, ...]."""
    return torch.as_tensor(values, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))


def cosine(step: int, steps: int, warmup: int, peak: Tensor, minimum: float = 0.0) -> Tensor:
    """Learning rates [N] of a step: linear from 0 over ``warmup`` steps to ``peak`` [N], then cosine to ``minimum``.

    >>> tuple(round(cosine(step, 10, 2, torch.tensor([1.0])).item(), 2) for step in (0, 1, 2, 6, 10))
    (0.0, 0.5, 1.0, 0.5, 0.0)
    """
    if step < warmup:
        return peak * (step / warmup)
    done = (step - warmup) / max(1, steps - warmup)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * done)) / 2
