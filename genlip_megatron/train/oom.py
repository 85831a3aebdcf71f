"""The error of a run that runs out of GPU memory in its first steps, with settings that would help."""

from __future__ import annotations

from genlip_megatron import estimate
from genlip_megatron.config import RunConfig, override
from genlip_megatron.config.checks import check
from genlip_megatron.estimate.sample import GIB

# Every allocation of a run has happened once by then; later failures are a leak or another process.
FIRST_STEPS = 3


def out_of_memory(config: RunConfig, world_size: int, error: BaseException, device: str = "cuda") -> str:
    """One line: the failed allocation, the estimate, and settings that would help with the memory they save.

    Args:
        error: torch's; its first two sentences are quoted.
        device: "cuda" or "cpu", for the estimate of its kernels' buffers.
    """
    need = estimate.memory(config, world_size, device).total
    helps: dict[str, str] = {}
    for kind, flags, change in _remedies(config, world_size):
        try:
            saved = need - estimate.memory(change, world_size, device).total
        except ValueError:
            continue
        if saved > 0:
            helps.setdefault(kind, f"{flags} (saves about {saved / GIB:.1f} GiB by estimate)")
    said = ". ".join(str(error).split(". ")[:2]).strip().rstrip(".")
    return (
        f"out of memory in the first steps: {said}. The estimate was {need / GIB:.2f} GiB for the fullest rank; "
        f"what would help: {', or '.join([*helps.values()][:3]) or 'more or larger GPUs, or a shorter data.seq_length'}"
    )


def _remedies(config: RunConfig, world_size: int) -> list[tuple[str, str, RunConfig]]:
    """(kind, flags, configuration) of settings that may lower memory, cheapest first; one per kind is enough."""
    train, parallel = config.train, config.parallel
    tp = parallel.tensor_model_parallel_size
    wanted: list[tuple[str, str, dict[str, object]]] = []
    if train.micro_batch_size > 1:
        size = train.micro_batch_size // 2
        wanted.append(("batch", f"--micro-batch-size {size}", {"train.micro_batch_size": size}))
    for modules in estimate.recompute_sets(config):
        flags = f"--recompute selective --recompute-modules {','.join(modules)}"
        recompute: dict[str, object] = {"parallel.recompute": "selective", "parallel.recompute_modules": modules}
        wanted.append(("selective", flags, recompute))
    wanted.append(("full", "--recompute full", {"parallel.recompute": "full"}))
    if parallel.pipeline_model_parallel_size == 1 and not parallel.fsdp and train.fp8 == "none":
        off = {"parallel.overlap_grad_reduce": False, "parallel.overlap_param_gather": False}
        wanted.append(("sharding", "--fsdp", {"parallel.fsdp": True, **off}))
    wanted.append(("split", f"--tp {2 * tp}", {"parallel.tensor_model_parallel_size": 2 * tp}))
    fitting = []
    for kind, flags, changes in wanted:
        changed = override(config, changes)
        try:
            check(changed, world_size)
        except ValueError:
            continue
        fitting.append((kind, flags, changed))
    return fitting
