"""Checkpoints around Megatron-Core's ``dist_checkpointing``: one folder a step, complete or absent.

A checkpoint is written to a hidden sibling folder, synced, renamed, and only then named in
``latest_checkpointed_iteration.txt`` (itself replaced atomically); so a crash leaves the previous one in place.
Model and optimizer are stored independent of the layout; the data cursor and everything else in the common part.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from genlip_megatron.config import RunConfig, from_dict
from genlip_megatron.model.genlip import unwrap
from genlip_megatron.parallel.fsdp import FullyShardedDataParallel

LATEST = "latest_checkpointed_iteration.txt"
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
# bfloat16 weights, float32 master weights and two float32 moments.
_BYTES_PER_PARAMETER = 14
# What may differ between the run that saved and the run that loads: it changes no tensor's shape or meaning.
_FREE_MODEL_FIELDS = ("drop_path_rate", "freeze_embeddings", "freeze_head", "init_method_std")


def step_folder(root: str | Path, iteration: int) -> Path:
    """Where the checkpoint of a step stands."""
    return Path(root) / f"iter_{iteration:07d}"


def latest_iteration(root: str | Path) -> int | None:
    """The step of the newest complete checkpoint, or None.

    Raises:
        ValueError: the folder's pointer names a checkpoint that is not there.
    """
    pointer = Path(root) / LATEST
    if not pointer.is_file():
        return None
    iteration = int(pointer.read_text().strip())
    if not step_folder(root, iteration).is_dir():
        raise ValueError(f"{pointer} names step {iteration}, but {step_folder(root, iteration)} is missing")
    return iteration


def read_config(folder: Path) -> RunConfig:
    """The configuration of the run that saved a checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint of this project.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.yaml")
    return from_dict(yaml.safe_load(file.read_text()), str(file))


def resolve(root: str | Path) -> tuple[Path, int]:
    """(folder, step) of the newest checkpoint under ``root``, or of ``root`` itself when it is one.

    Raises:
        ValueError: there is none.
    """
    root = Path(root)
    if root.name.startswith("iter_") and (root / "config.yaml").is_file():
        return root, int(root.name.removeprefix("iter_"))
    iteration = latest_iteration(root)
    if iteration is None:
        raise ValueError(f"checkpoint.load = {root}: no checkpoint there (no {LATEST})")
    return step_folder(root, iteration), iteration


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rank() -> int:
    return torch.distributed.get_rank()


def check_free_space(root: str | Path, config: RunConfig, parameters: int) -> None:
    """Raise ValueError when a checkpoint of ``parameters`` parameters does not fit on the disk of ``root``."""
    Path(root).mkdir(parents=True, exist_ok=True)
    needed = parameters * _BYTES_PER_PARAMETER
    free = shutil.disk_usage(root).free
    if free < needed:
        raise ValueError(
            f"checkpoint.save = {root}: {free / 1e9:.2f} GB free, one checkpoint of {parameters} parameters takes "
            f"{needed / 1e9:.2f} GB; free some space or choose another folder"
        )


def _random_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save(
    root: str | Path,
    iteration: int,
    config: RunConfig,
    model: list[Any],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    common: dict[str, Any],
) -> Path:
    """Save a run's state as the newest checkpoint. A collective over all ranks.

    Args:
        common: what is the same on every rank (counters, data cursor); only rank 0's is written.
    """
    target = step_folder(root, iteration)
    partial = target.with_name(f".{target.name}.partial")
    if _rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    weights = _weights(model)
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=_OPTIMIZER_FORMAT),
        "scheduler": scheduler.state_dict(),
        "iteration": iteration,
        "random": _random_state(),
        **common,
    }
    dist_checkpointing.save(state, str(partial), content_metadata=_OPTIMIZER_FORMAT)
    torch.distributed.barrier()
    if _rank() == 0:
        (partial / "config.yaml").write_text(config.to_yaml())
        _sync_tree(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
        _sync_tree(Path(root) / target.name)
        _replace_text(Path(root) / LATEST, f"{iteration}\n")
    torch.distributed.barrier()
    return target


def check_same_model(saved: RunConfig, config: RunConfig, folder: Path) -> None:
    """Raise ValueError listing every field by which the saved model differs from the configured one."""
    theirs, ours = saved.to_dict()["model"], config.to_dict()["model"]
    differing = [
        f"model.{name}: {theirs[name]!r} in the checkpoint, {ours[name]!r} here"
        for name in ours
        if name not in _FREE_MODEL_FIELDS and theirs[name] != ours[name]
    ]
    if differing:
        raise ValueError(f"{folder} holds another model; " + "; ".join(differing))


def _weights_of(chunk: Any) -> Any:
    """The part of a wrapped model chunk whose ``sharded_state_dict`` a checkpoint holds, whatever the wrapper."""
    return chunk if isinstance(chunk, FullyShardedDataParallel) else unwrap(chunk)


def _weights(model: list[Any]) -> dict[str, dict[str, Any]]:
    """Sharded tensors of this rank's chunks; what they are called in a checkpoint does not depend on the layout."""
    return {f"chunk{i}": _weights_of(chunk).sharded_state_dict() for i, chunk in enumerate(model)}


def _set_weights(model: list[Any], weights: dict[str, dict[str, Any]]) -> None:
    for i, chunk in enumerate(model):
        _weights_of(chunk).load_state_dict(weights[f"chunk{i}"])


def load_weights(root: str | Path, config: RunConfig, model: list[Any]) -> int:
    """Set the model's weights from the newest checkpoint under ``root``; returns its step. Any layout."""
    folder, iteration = resolve(root)
    check_same_model(read_config(folder), config, folder)
    loaded = dist_checkpointing.load({"model": _weights(model)}, str(folder))
    _set_weights(model, loaded["model"])
    return iteration


def load(
    root: str | Path,
    config: RunConfig,
    model: list[Any],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> dict[str, Any]:
    """Continue from the newest checkpoint under ``root``; returns the common part. Any layout.

    Raises:
        ValueError: there is none, or it holds another model.
    """
    folder, _ = resolve(root)
    check_same_model(read_config(folder), config, folder)
    weights = _weights(model)
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=True, metadata=_OPTIMIZER_FORMAT),
    }
    loaded = dist_checkpointing.load(state, str(folder))
    _set_weights(model, loaded.pop("model"))
    optimizer.load_state_dict(loaded.pop("optimizer"))
    scheduler.load_state_dict(loaded.pop("scheduler"))
    _set_random_state(loaded.pop("random"))
    return loaded


def data_parallel_gather(value: Any) -> list[Any]:
    """``value`` of every data-parallel rank of this rank's group."""
    group = parallel_state.get_data_parallel_group()
    values: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values
