"""Search for layouts that fit, fastest first, and refuse a layout that does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from genlip_megatron.config import LINEAR_INPUTS, RunConfig
from genlip_megatron.config.checks import check
from genlip_megatron.estimate.cost import Estimate, estimate
from genlip_megatron.estimate.memory import memory
from genlip_megatron.estimate.sample import GIB, GPUS_PER_NODE, MACHINES, Machine, SampleMix, default_mix, micro_batches


def recompute_sets(config: RunConfig) -> list[tuple[str, ...]]:
    """Sets of modules worth recomputing together, the cheapest set first."""
    sets = (
        ("core_attn",),
        ("core_attn", *LINEAR_INPUTS),
        ("core_attn", "mlp"),
        ("core_attn", "mlp", "layernorm", "output_gate"),
    )
    gone = ("output_gate",) if config.model.attention_output_gate == "none" else ()
    return [tuple(name for name in modules if name not in gone) for modules in sets]


def layouts(config: RunConfig, world_size: int) -> Iterator[RunConfig]:
    """``config`` on every valid layout worth trying.

    Tried are T, P and C in powers of two, T within a node; 1, 2 or 4 model chunks; up to 16 packs in a micro-batch;
    FSDP as in ``config`` and on; recomputation as in ``config``, none, full, and each of ``recompute_sets``.
    """
    powers = [2**i for i in range(world_size.bit_length())]
    micro = sorted({config.train.micro_batch_size, *(size for size in powers if size <= 16)})
    sets = recompute_sets(config)
    modes = [("none", sets[0]), *(("selective", modules) for modules in sets), ("full", sets[0])]
    shardings = sorted({config.parallel.fsdp, True})
    own = (config.parallel.recompute, config.parallel.recompute_modules)
    modes = [own, *(mode for mode in modes if mode != own and (mode[0] == "selective" or mode[0] != own[0]))]
    for tp, pp, cp in itertools.product(powers, powers, powers):
        if tp * pp * cp > world_size or tp > GPUS_PER_NODE:
            continue
        for vpp, size, (recompute, modules), fsdp in itertools.product((1, 2, 4), micro, modes, shardings):
            parallel = replace(
                config.parallel,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                context_parallel_size=cp,
                virtual_pipeline_model_parallel_size=vpp,
                fsdp=fsdp,
                # FSDP overlaps communication itself and is refused with these.
                overlap_grad_reduce=config.parallel.overlap_grad_reduce and not fsdp,
                overlap_param_gather=config.parallel.overlap_param_gather and not fsdp,
                recompute=recompute,
                recompute_modules=modules,
                recompute_num_layers=config.parallel.recompute_num_layers if recompute == own[0] else 0,
            )
            if pp != config.parallel.pipeline_model_parallel_size:
                parallel = replace(parallel, num_layers_in_first_pipeline_stage=0, num_layers_in_last_pipeline_stage=0)
            changed = replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=size))
            # Interleaving needs a multiple of P micro-batches.
            if vpp > 1 and micro_batches(changed, world_size) % pp:
                continue
            try:
                check(changed, world_size)
            except ValueError:
                continue
            yield changed


LAYOUT_FLAGS = {
    "parallel.tensor_model_parallel_size": "--tp",
    "parallel.pipeline_model_parallel_size": "--pp",
    "parallel.virtual_pipeline_model_parallel_size": "--vpp",
    "parallel.context_parallel_size": "--cp",
    "train.micro_batch_size": "--micro-batch-size",
    "parallel.fsdp": "--fsdp",
    "parallel.overlap_grad_reduce": "--overlap-grad-reduce",
    "parallel.overlap_param_gather": "--overlap-param-gather",
    "parallel.recompute": "--recompute",
    "parallel.recompute_modules": "--recompute-modules",
    "parallel.recompute_num_layers": "--recompute-num-layers",
    "parallel.num_layers_in_first_pipeline_stage": "--num-layers-in-first-pipeline-stage",
    "parallel.num_layers_in_last_pipeline_stage": "--num-layers-in-last-pipeline-stage",
}
_ALWAYS_SHOWN = ("--tp", "--pp", "--micro-batch-size", "--recompute")


def layout_flags(config: RunConfig, given: RunConfig | None = None) -> str:
    """The flags of ``pretrain_genlip.py`` that change ``given`` (None: the defaults) into the layout of ``config``."""
    given, words = given or RunConfig(), []
    for name, flag in LAYOUT_FLAGS.items():
        value = config.value(name)
        differs = value != given.value(name)
        if flag == "--recompute-modules":
            differs = differs and config.parallel.recompute == "selective"
            value = ",".join(value)
        if isinstance(value, bool):
            words += [flag if value else flag.replace("--", "--no-", 1)] if differs else []
        elif differs or flag in _ALWAYS_SHOWN:
            words.append(f"{flag} {value}")
    return " ".join(words)


def changes(config: RunConfig, other: RunConfig) -> int:
    """Number of layout settings that differ. Overlap follows ``fsdp`` and does not count."""
    both = config.parallel.recompute == other.parallel.recompute == "selective"
    return sum(
        config.value(name) != other.value(name)
        for name, flag in LAYOUT_FLAGS.items()
        if (both or flag != "--recompute-modules") and not flag.startswith("--overlap-")
    )


def _rank(found: Estimate) -> tuple[float, float, float]:
    """Sort key: fastest, then most tokens in a micro-batch up to 128 thousand, then least memory."""
    tokens = found.config.train.micro_batch_size * found.config.data.seq_length
    return (round(found.step_seconds, 6), -tokens if tokens <= 2**17 else tokens, found.memory.total)


def best_layouts(
    config: RunConfig, world_size: int, machine: Machine, mfu: float, mix: SampleMix | None = None, device: str = "cuda"
) -> list[Estimate]:
    """Every layout that fits ``machine``, fastest first."""
    mix = mix or default_mix(config)
    found = (estimate(layout, world_size, machine, mfu, mix, device) for layout in layouts(config, world_size))
    return sorted((e for e in found if e.memory.total <= machine.memory), key=_rank)


def nearest_fit(
    config: RunConfig, world_size: int, capacity_bytes: float, device: str = "cuda", mix: SampleMix | None = None
) -> list[RunConfig]:
    """The layouts that fit ``capacity_bytes`` on each rank: fewest changed settings first, then fastest."""
    machine = replace(MACHINES["h100"], memory=capacity_bytes)
    found = best_layouts(config, world_size, machine, 0.45, mix, device)
    return [e.config for e in sorted(found, key=lambda e: (changes(config, e.config), _rank(e)))]


def check_fits(config: RunConfig, world_size: int, capacity_bytes: float, device: str) -> None:
    """Refuse a layout whose fullest rank needs more than ``capacity_bytes``.

    Raises:
        ValueError: states the need, its parts, the capacity, and the flags of the nearest layout that fits.
    """
    need = memory(config, world_size, device)
    if need.total <= capacity_bytes:
        return
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in need.parts().items() if size)
    nearest = nearest_fit(config, world_size, capacity_bytes, device)
    advice = (
        f"no layout on {world_size} ranks fits; use more or larger GPUs, a shorter data.seq_length or a smaller model"
    )
    if nearest:
        advice = f"the nearest layout that fits: {layout_flags(nearest[0], config)}"
    raise ValueError(
        f"{layout_flags(config)}: the fullest rank (pipeline stage {need.stage}) needs an estimated "
        f"{need.total / GIB:.2f} GiB of {capacity_bytes / GIB:.2f} GiB ({parts}); {advice}. "
        "--no-check-memory starts the run anyway."
    )
