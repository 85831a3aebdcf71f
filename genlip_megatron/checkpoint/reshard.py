"""Resharding: rewrite a checkpoint with the other kind of optimizer state, on CPU processes, without data.

Imports within functions wait until ``megatron_patches.install`` has run in the new processes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessException

from genlip_megatron.config import LOCAL_LAYERS, RunConfig, override
from genlip_megatron.log import log
from genlip_megatron.model.state_dict import is_fp8_state

# The run's layout on the fewest ranks that hold its shards. Settings that do not change how state is cut are off.
_FEWEST_RANKS = {
    "parallel.context_parallel_size": 1,
    "parallel.overlap_param_gather": False,
    "parallel.offload_modules": (),
    "parallel.recompute": "none",
    "train.attention_backend": "auto",
    **LOCAL_LAYERS,
}
# Parts of the common state that the save writes itself.
_REWRITTEN = ("model", "optimizer", "scheduler", "objects", "iteration", "random")

BuildRun = Callable[[RunConfig], Any]


def reshard(place: Path, kind: str, output: Path, build_run: BuildRun, layout: dict[str, int] | None = None) -> Path:
    """Rewrite a checkpoint with the other kind of optimizer state; everything else stays the same.

    Starts tensor x pipeline parallel size processes.

    Args:
        place: the checkpoint.
        kind: of optimizer state to write.
        output: folder of checkpoints to write to; the source's own folder replaces it once the new one is complete.
        build_run: ``train.setup.build_run`` or a function that imports and calls it; each process calls it.
        layout: ``parallel`` settings of the run that will read ``dp_reshardable`` state; by default the source's.

    Returns:
        The new checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, of that kind already, or does not fit the layout; or it could not be
            written.
    """
    from genlip_megatron.checkpoint import loading, manifest, paths, torch_metadata
    from genlip_megatron.checkpoint.manifest import DP_RESHARDABLE, FULLY_RESHARDABLE, WEIGHTS_ONLY
    from genlip_megatron.config.checks import check
    from genlip_megatron.model.te_support import fp8_primary_weights, fused_norms

    saved = manifest.read(place)
    if saved.kind == WEIGHTS_ONLY:
        raise ValueError(f"{place} holds weights only, which any layout reads: there is no optimizer state to reshard")
    if saved.kind == kind and not layout:
        raise ValueError(f"{place} holds {kind} optimizer state already")
    if saved.kind == DP_RESHARDABLE and layout:
        raise ValueError(
            f"{place} is {saved.kind}: only its own layout reads it. First reshard it to {FULLY_RESHARDABLE}"
        )
    if wrong := manifest.problems(place, saved, checksums=True):
        raise ValueError("; ".join(wrong))
    recorded = loading.read_config(place)
    if recorded.parallel.fsdp:
        raise ValueError(f"{place} was saved with --fsdp: any layout reads its optimizer state")
    if (fused_norms(recorded) or fp8_primary_weights(recorded)) and DP_RESHARDABLE in (saved.kind, kind):
        raise ValueError(
            f"{place}: {DP_RESHARDABLE} state of Transformer Engine's layers has another order of parameters, "
            "which this tool cannot convert. Resume the run on its own layout: its last save is "
            f"{FULLY_RESHARDABLE}"
        )
    if any(is_fp8_state(key) for key in torch_metadata.read(place).state_dict_metadata):
        log(f"{place}: its FP8 scales are left out; a run that needs them starts with new ones")
    changes: dict[str, Any] = {f"parallel.{name}": size for name, size in (layout or {}).items()}
    if layout:
        changes |= {f"parallel.num_layers_in_{end}_pipeline_stage": 0 for end in ("first", "last")}
    recorded = override(recorded, {**changes, "train.precision": saved.layout["precision"]})
    config = override(recorded, {**_FEWEST_RANKS, "checkpoint.save": str(output), "checkpoint.keep_last": 0})
    world_size = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    check(config, world_size)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        arguments = (world_size, port, config, recorded, place, kind, build_run)
        torch.multiprocessing.spawn(_work, arguments, nprocs=world_size)  # type: ignore[attr-defined]
    except ProcessException as error:
        raise ValueError(f"{place} could not be resharded: {str(error).strip().splitlines()[-1]}") from error
    return paths.step_folder(output, saved.iteration)


def _work(
    rank: int,
    world_size: int,
    port: int,
    config: RunConfig,
    recorded: RunConfig,
    place: Path,
    kind: str,
    build_run: BuildRun,
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before any code asks for a device
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    from megatron.core import dist_checkpointing

    from genlip_megatron.checkpoint import loading, manifest
    from genlip_megatron.checkpoint.parts import RandomStates, State
    from genlip_megatron.checkpoint.saving import Facts, Saver
    from genlip_megatron.parallel import groups

    groups.initialize(config)
    saved = manifest.read(place)
    run = build_run(config)
    state = State(run.model, run.optimizer, run.scheduler)
    loading.load(place, saved, config, state, log)
    random = RandomStates.of_another_run(saved.random, saved.layout["world_size"])
    rows = dist_checkpointing.load({"random": random.parts}, str(place))["random"]
    for name, part in random.parts.items():
        part.data = rows[name]
    common = {name: value for name, value in loading.read_common(place).items() if name not in _REWRITTEN}
    facts = Facts(saved.tokenizer, saved.data, saved.validation_loss)
    saver = Saver(config, state, log, recorded=recorded)
    saver.save(saved.iteration, common, kind, facts, random=random)
    saver.close()
    groups.finalize()
