"""Turning one kind of optimizer state into the other, offline: on CPU processes, without data."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import torch

from genlip_megatron.config import RunConfig, override

# A run's layout on as few ranks as hold its shards; what does not change how state is cut is left out.
_ALONE = {
    "parallel.context_parallel_size": 1,
    "parallel.overlap_param_gather": False,
    "parallel.offload_modules": (),
    "parallel.recompute": "none",
    "train.attention_backend": "auto",
    "train.transformer_impl": "local",
}
# Written anew by the save.
_RENEWED = ("model", "optimizer", "scheduler", "objects", "iteration", "random")


def reshard(place: Path, kind: str, output: Path, layout: dict[str, int] | None = None) -> Path:
    """Write a checkpoint again with the other kind of optimizer state; everything else stays. Takes
    tensor * pipeline parallel size processes.

    Args:
        place: the checkpoint.
        kind: of optimizer state to write.
        output: folder of checkpoints to write to; the source's own folder replaces it once the new one is complete.
        layout: ``dp_reshardable`` only: the ``parallel`` settings that are to read it; by default the source's.

    Returns:
        The new checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, of that kind already, or does not fit the layout.
    """
    from genlip_megatron.checkpoint import folder, loading, manifest
    from genlip_megatron.checkpoint.content import DP_RESHARDABLE
    from genlip_megatron.checks import check

    saved = manifest.read(place)
    if saved.kind == kind and not layout:
        raise ValueError(f"{place} holds {kind} optimizer state already")
    if saved.kind == DP_RESHARDABLE and layout:
        raise ValueError(f"{place} is {saved.kind}, which its own layout alone reads: first make it fully_reshardable")
    config = loading.read_config(place)
    if config.parallel.fsdp:
        raise ValueError(f"{place} was saved with --fsdp, whose optimizer state is read by any layout")
    changes: dict[str, Any] = {f"parallel.{name}": size for name, size in (layout or {}).items()}
    if layout:
        changes |= {f"parallel.num_layers_in_{end}_pipeline_stage": 0 for end in ("first", "last")}
    changes |= {**_ALONE, "train.precision": saved.layout["precision"], "checkpoint.save": str(output)}
    changes |= {"checkpoint.keep_last": 0}
    config = override(config, changes)
    world_size = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    check(config, world_size)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the processes, which start with it
    arguments = (world_size, port, config, place, kind)
    torch.multiprocessing.spawn(_work, arguments, nprocs=world_size)  # type: ignore[attr-defined]
    return folder.step_folder(output, saved.iteration)


def _work(rank: int, world_size: int, port: int, config: RunConfig, place: Path, kind: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    from genlip_megatron import host

    host.install()
    from megatron.core import dist_checkpointing

    from genlip_megatron.checkpoint import loading
    from genlip_megatron.checkpoint.content import RandomStates, State
    from genlip_megatron.checkpoint.saving import Facts, Saver
    from genlip_megatron.parallel import groups
    from genlip_megatron.train.loop import build_run
    from genlip_megatron.train.resume import log

    groups.initialize(config)
    found = loading.find(place, True, log)
    assert found is not None
    saved = found[1]
    run = build_run(config)
    state = State(run.model, run.optimizer, run.scheduler)
    loading.load(place, saved, config, state)
    random = RandomStates.of_another_run(saved.random, saved.layout["world_size"])
    rows = dist_checkpointing.load({"random": random.parts}, str(place))["random"]
    random = dataclasses.replace(
        random, parts={name: dataclasses.replace(part, data=rows[name]) for name, part in random.parts.items()}
    )
    common = {name: value for name, value in loading.read_common(place).items() if name not in _RENEWED}
    facts = Facts(saved.tokenizer, saved.data, saved.validation_loss)
    saver = Saver(config, state, log)
    saver.save(saved.iteration, common, kind, facts, random=random)
    saver.close()
    groups.finalize()
