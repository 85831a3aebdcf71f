"""Parity: train on a layout, and compare the run with the same run on one process.

Equal bit for bit: initial weights; the order of the samples; after the last step, the replicas of each parameter.
Equal within a tolerance: every gradient tensor of the first step, the loss of every step, the validation loss, and the
weights after the last step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from genlip_megatron.config import RunConfig
from genlip_megatron.testing.runs import full_weights, merged, outcomes, tiny_config

STEPS = 10


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed differences from the run on one process.

    Attributes:
        loss: relative.
        gradient: norm of a tensor's difference over the tensor's norm.
        weight: norm of the difference over the norm of the tensor's change since the start.
    """

    loss: float
    gradient: float
    weight: float


EXACT = Tolerance(loss=0.0, gradient=0.0, weight=0.0)
# Sums run in another order. docs/parity.md has the largest errors measured, here and in bfloat16.
FLOAT32 = Tolerance(loss=1e-6, gradient=1e-5, weight=1e-3)
# bfloat16 has 8 significant bits, and sums in another order change the last. Weights are rounded too: at 0.1 a
# LayerScale changes in steps of 0.0005, about what ten steps change.
BFLOAT16 = Tolerance(loss=2e-4, gradient=0.1, weight=0.75)

DATA: dict[str, dict[str, Any]] = {
    "stage 1": {"data__image_mode": "fixed", "data__image_size": 96},
    "stage 2": {"data__image_mode": "native"},
}


def parity_config(data: Path, stage: str = "stage 2", drop_path: float = 0.2, **flags: Any) -> RunConfig:
    """The compared run: fixed-size images as in stage 1, or native ones as in stage 2."""
    common = {"model__drop_path_rate": drop_path, "train__train_iters": STEPS, **DATA[stage]}
    return tiny_config(data, **{**common, **flags})


def gradients(run: Any) -> dict[str, Tensor]:
    """Full canonical gradients of this rank's stage, as the optimizer sees them."""
    from megatron.core import parallel_state

    from genlip_megatron.model.genlip import unwrap
    from genlip_megatron.model.weights import gather_canonical

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    kind = "grad" if run.config.parallel.fsdp else "main_grad"
    full: dict[str, Tensor] = {}
    for chunk in run.model:
        # The distributed optimizer's reduction leaves each rank its part of a bucket; FSDP has no buckets.
        for buffer in [] if run.config.parallel.fsdp else chunk.buffers:
            for bucket in buffer.buckets:
                mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=group)
        model = unwrap(chunk)
        full |= gather_canonical(model, {name: getattr(p, kind) for name, p in model.named_parameters()})
    return {name: tensor.clone() for name, tensor in full.items()}


def _odd_replicas(run: Any) -> list[str]:
    """Parameters that are not bit-equal on all ranks that hold the same part of them."""
    from megatron.core import parallel_state

    from genlip_megatron.model.genlip import unwrap

    odd = []
    for chunk in run.model:
        for name, parameter in unwrap(chunk).named_parameters():
            sharded = parameter.tensor_model_parallel
            groups = [parallel_state.get_data_parallel_group(with_context_parallel=True)]
            if isinstance(parameter, DTensor):  # sharded over that group, so it has no replicas
                groups, parameter = [], parameter.full_tensor()
            if not sharded:
                groups.append(parallel_state.get_tensor_model_parallel_group())
            for group in groups:
                replicas = [torch.empty_like(parameter) for _ in range(group.size())]
                torch.distributed.all_gather(replicas, parameter.detach().contiguous(), group=group)
                if not all(torch.equal(replicas[0], replica) for replica in replicas):
                    odd.append(name)
    return odd


def parity_run(config: RunConfig, steps: int = STEPS, fault: str | None = None) -> dict[str, Any]:
    """Train on every rank of the job; returns what is compared. ``fault`` is a name of ``planted.FAULTS``."""
    from megatron.core import parallel_state

    from genlip_megatron.testing.planted import planted
    from genlip_megatron.train.resume import gather_weights, save
    from genlip_megatron.train.setup import set_up
    from genlip_megatron.train.validation import evaluate

    with planted(fault):
        run = set_up(config)
        assert run.train_loader is not None
        begin = run.iteration
        initial = full_weights(run)
        first_gradients: dict[str, Tensor] = {}
        losses, validation = [], 0.0
        keys: list[tuple[str, ...]] = []
        prepare_grads = run.optimizer.prepare_grads

        def noting() -> bool:
            if not first_gradients:
                first_gradients.update(gradients(run))
            return prepare_grads()

        run.optimizer.prepare_grads = noting
        for outcome in outcomes(run, steps, keys):
            losses.append(outcome.loss)
            if run.iteration == 2:
                # Between steps, while the layout's gathers and caches are in use.
                validation = evaluate(run)
        save(run, last=True)
        gather_weights(run)
        run.train_loader.close()
        return {
            "steps": steps - begin,
            "initial": initial,
            "gradients": first_gradients,
            "losses": losses,
            "validation": validation,
            "keys": keys,
            "reads": parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage(),
            "data_parallel": parallel_state.get_data_parallel_rank(),
            "odd_replicas": _odd_replicas(run),
            "weights": full_weights(run),
        }


def worst_errors(results: list[dict[str, Any]], reference: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """(largest difference from ``reference``, the result on one process; where it is) of each kind."""
    found, weights = merged(results, "gradients"), merged(results, "weights")

    def relative(ours: Tensor, theirs: Tensor) -> float:
        return ((ours - theirs).double().norm() / theirs.double().norm().clamp(min=1e-30)).item()

    moved = {name: reference["weights"][name] - reference["initial"][name] for name in weights}
    return {
        "loss": max(
            (abs(ours / theirs - 1), f"step {step}")
            for result in results
            for step, (ours, theirs) in enumerate(zip(result["losses"], reference["losses"], strict=True), start=1)
        ),
        "gradient": max((relative(found[name], theirs), name) for name, theirs in reference["gradients"].items()),
        "weight": max((relative(weights[name] - reference["initial"][name], moved[name]), name) for name in weights),
    }


def problems(results: list[dict[str, Any]], reference: dict[str, Any], tolerance: Tolerance = FLOAT32) -> list[str]:
    """How a layout's results differ from those of one process; empty if they agree."""
    for kind in ("initial", "gradients", "weights"):
        missing = set(reference[kind]) - set(merged(results, kind))
        if missing:
            return [f"{kind} lack {sorted(missing)}"]
    initial = merged(results, "initial")
    found = [f"initial {name} differs" for name, x in initial.items() if not torch.equal(x, reference["initial"][name])]
    for kind, (error, where) in worst_errors(results, reference).items():
        limit = getattr(tolerance, kind)
        if not error <= limit:
            found.append(f"{kind} differs by {error:.1e} in {where}, allowed {limit:.0e}")
    for result in results:
        if not abs(result["validation"] - reference["validation"]) <= tolerance.loss * reference["validation"]:
            found.append(f"validation loss is {result['validation']}, expected {reference['validation']}")
    odd = sorted({name for result in results for name in result["odd_replicas"]})
    if odd:
        found.append(f"replicas differ: {', '.join(odd)}")
    if not _same_stream(results, reference):
        found.append("the order of the samples differs")
    return found


def _same_stream(results: list[dict[str, Any]], reference: dict[str, Any]) -> bool:
    """Whether in each step the data-parallel ranks together read the samples of one process, in its order."""
    by_rank = {result["data_parallel"]: result["keys"] for result in results if result["reads"]}
    share = len(reference["keys"]) // reference["steps"] // len(by_rank)  # micro-batches of a rank in a step
    steps = range(0, reference["steps"] * share, share)
    stream = [keys for i in steps for rank in sorted(by_rank) for keys in by_rank[rank][i : i + share]]
    return stream == reference["keys"]
