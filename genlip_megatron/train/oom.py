"""The error of a run that runs out of GPU memory in its first steps, with settings that would help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    for kind, flags, changes in _remedies(config):
        try:
            changed = override(config, changes)
            check(changed, world_size)
            saved = need - estimate.memory(changed, world_size, device).total
        except ValueError:
            continue
        if saved > 0:
            helps.setdefault(kind, f"{flags} (saves about {saved / GIB:.1f} GiB by estimate)")
    said = ". ".join(str(error).split(". ")[:2]).strip().rstrip(".")
    return (
        f"out of memory in the first steps: {said}. The estimate was {need / GIB:.2f} GiB for the fullest rank; "
        f"what would help: {', or '.join([*helps.values()][:3]) or 'more or larger GPUs, or a shorter data.seq_length'}"
    )


def _remedies(config: RunConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kind, flags, settings) of changes that may lower memory, cheapest first; one per kind is enough.

    Some may be impossible, such as half of a micro-batch of one pack.
    """
    half, twice = config.train.micro_batch_size // 2, 2 * config.parallel.tensor_model_parallel_size
    yield "batch", f"--micro-batch-size {half}", {"train.micro_batch_size": half}
    for modules in estimate.recompute_sets(config):
        settings = {"parallel.recompute": "selective", "parallel.recompute_modules": modules}
        yield "selective", f"--recompute selective --recompute-modules {','.join(modules)}", settings
    yield "full", "--recompute full", {"parallel.recompute": "full"}
    off = {"parallel.overlap_grad_reduce": False, "parallel.overlap_param_gather": False}
    yield "sharding", "--fsdp", {"parallel.fsdp": True, **off}
    yield "split", f"--tp {twice}", {"parallel.tensor_model_parallel_size": twice}
