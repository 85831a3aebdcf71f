"""AdamW in Megatron-Core's distributed optimizer, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.timers import Timers
from torch.optim.adamw import adamw

from genlip_megatron import megatron_patches
from genlip_megatron.config import RunConfig
from genlip_megatron.model.specs import compute_dtype
from genlip_megatron.model.te_support import RECIPES, choose_fp8
from genlip_megatron.train.fsdp import FullyShardedOptimizer


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW that counts steps per parameter group, as Transformer Engine's and Apex's do.

    ``megatron_patches.py`` says why Megatron-Core needs it.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "weight decay is decoupled here"
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            done = group.get("step", 0)
            group["step"] = done + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            # torch wants one count per parameter; filled on the device, because copies from the host would wait.
            steps = torch.full((len(parameters),), float(done), device=parameters[0].device)
            adamw(
                parameters,
                [p.grad for p in parameters],  # type: ignore[misc]
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                list(steps.unbind()),
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def build_optimizer(config: RunConfig, model: list[Any], timers: Timers) -> MegatronOptimizer:
    """The distributed optimizer over all trainable parameters, weight decay on every one."""
    megatron_patches.count_steps_per_group(GroupStepAdamW)
    train = config.train
    options = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=compute_dtype(config) is torch.bfloat16,
        params_dtype=compute_dtype(config),
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
        fp8_recipe=RECIPES[train.fp8_recipe] if choose_fp8(config).linears else None,
        timers=timers,
    )
    if config.parallel.fsdp:
        groups = megatron_optimizer._get_param_groups(model, options, {})
        adam = GroupStepAdamW(
            groups, train.lr, train.weight_decay, (train.adam_beta1, train.adam_beta2), train.adam_eps
        )
        return FullyShardedOptimizer(adam, options, model[0])
    # None would exempt vectors from weight decay; an empty mapping means no exception.
    return get_megatron_optimizer(options, model, config_overrides={})


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warmup, then cosine to ``min_lr`` at ``train_iters``.

    Counts steps, not samples as Megatron-LM does, so a run may resume with another global batch size.
    """
    train = config.train
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.lr_warmup_iters,
        lr_decay_steps=train.train_iters,
        lr_decay_style="cosine",
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=train.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
