"""Loading: find the newest good checkpoint, check that it fits, and set a run's state from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.optimizer.optimizer import MegatronOptimizer

from genlip_megatron.checkpoint import manifest, parts, paths, torch_metadata
from genlip_megatron.checkpoint.collectives import from_rank_0, gather, rank, world_size
from genlip_megatron.checkpoint.manifest import CONFIG, DP_RESHARDABLE, FULLY_RESHARDABLE, Manifest
from genlip_megatron.checkpoint.parts import LAYOUT_OF_SHARDS, RandomStates, State
from genlip_megatron.config import RunConfig, from_dict


def read_config(place: Path) -> RunConfig:
    """The configuration of the run that saved a checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint.
    """
    file = place / CONFIG
    if not file.is_file():
        raise ValueError(f"{place} is not a checkpoint: it has no {CONFIG}")
    return from_dict(yaml.safe_load(file.read_text()), str(file))


def find(
    root: str | Path, checksums: bool, log: Callable[[str], None], progress: Callable[[int], Any] = lambda size: None
) -> tuple[Path, Manifest] | None:
    """The newest good checkpoint in ``root``, or ``root`` itself if it is one; None without any checkpoint.

    Damaged checkpoints are skipped with a warning. A collective over all ranks, which divide the reading.

    Args:
        progress: called with the bytes of each file that has been read.

    Raises:
        ValueError: every checkpoint is damaged.
    """
    root = Path(root)
    itself = paths.step_of(root) is not None
    places = from_rank_0([root] if itself else [paths.step_folder(root, step) for step in paths.steps(root)])
    damage: list[str] = []
    for place in places:
        found = _verified(place, checksums, progress)
        if isinstance(found, Manifest):
            if damage:
                log("WARNING: skipping damaged checkpoints:\n  " + "\n  ".join(damage))
                log(f"WARNING: resuming from step {found.iteration} instead")
            named = paths.pointed(root)
            if not itself and not damage and named != found.iteration:
                log(f"WARNING: {root / paths.LATEST} names step {named}; the newest good one is {found.iteration}")
            return place, found
        damage += found
    if not places:
        return None
    raise ValueError(f"no good checkpoint in {root}: " + "; ".join(damage))


# Entries of an optimizer's parameter group that training changes; "step" counts updates.
_STATE_OF_A_GROUP = ("params", "step")
# Settings that decide which rank a random state belongs to.
_PLACES = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def _verified(place: Path, checksums: bool, progress: Callable[[int], Any]) -> Manifest | list[str]:
    """The manifest of a good checkpoint, else its damage. A collective."""
    found: Manifest | list[str] = []
    if rank() == 0:
        try:
            found = manifest.read(place)
            if (step := paths.step_of(place)) != found.iteration:
                found = [f"{place}: its {manifest.MANIFEST} says step {found.iteration}, not {step}"]
        except manifest.Damaged as error:
            found = [str(error)]
    found = from_rank_0(found)
    if not isinstance(found, Manifest):
        return found
    mine = manifest.problems(place, found, checksums, (rank(), world_size()), progress)
    return [problem for some in gather(mine) for problem in some] or found


def read_common(place: Path) -> dict[str, Any]:
    """The common part of a checkpoint, the same for every rank: plain values and tensors, no code."""
    return load_common_state_dict(str(place))


def _describe_weights(place: Path, model: list[Any], log: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The tensors to load into the model; logs FP8 scales that the checkpoint lacks."""
    weights = parts.weights_of(model)
    if parts.has_unsaved_fp8_state(model):
        log(f"{place}: FP8 attention's scales are not saved with train.first_last_layers_bf16 and start new")
    if missing := parts.leave_out_fp8_state(weights, torch_metadata.read(place)):
        log(f"{place} lacks FP8 scales, which start new: {missing[0]} and {len(missing) - 1} more")
    return weights


def load_weights(place: Path, model: list[Any], log: Callable[[str], None]) -> None:
    """Set the model's weights and any FP8 scales from a checkpoint of any layout. A collective."""
    state = {"model": _describe_weights(place, model, log)}
    parts.put_objects(state, read_common(place)["objects"])
    parts.set_weights(model, dist_checkpointing.load(state, str(place))["model"])


def check_layout(place: Path, saved: Manifest, config: RunConfig) -> None:
    """Raise ValueError if this layout cannot read the optimizer state."""
    here = parts.describe_layout(config, world_size())
    settings = {
        "precision": "train.precision",
        "fused_norms": "norms within the linears (train.transformer_impl = transformer_engine, unless "
        "parallel.recompute_modules or parallel.offload_modules name a norm)",
        "fp8_primary_weights": "train.fp8_primary_weights",
    }
    differing = [
        f"{settings.get(name, f'parallel.{name}')}: {saved.layout.get(name)!r} in the checkpoint, {here[name]!r} here"
        for name in LAYOUT_OF_SHARDS
        if saved.kind == DP_RESHARDABLE and saved.layout.get(name) != here[name]
    ]
    if not differing:
        return
    fused = saved.layout.get("fused_norms") or saved.layout.get("fp8_primary_weights")  # reshard refuses them
    other = (
        f"or load its last save, of kind {FULLY_RESHARDABLE}, which any layout reads"
        if fused
        else f"or make it readable by any layout: tools/checkpoints.py reshard {place}"
    )
    raise ValueError(
        f"{place} holds optimizer state of kind {saved.kind}, which needs the layout that saved it: "
        f"{'; '.join(differing)}. Use that layout, {other}"
    )


def _load_optimizer(optimizer: MegatronOptimizer, saved: dict[str, Any]) -> None:
    """Set moments, master weights and the count of steps. All other settings of the groups stay this run's.

    Without this, optimizers restore the checkpoint's settings, and Megatron-Core's schedule prefers a group's
    ``max_lr`` and ``min_lr`` to its own.
    """
    configured = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        restored = {name: group[name] for name in _STATE_OF_A_GROUP if name in group}
        group.clear()
        group.update({name: value for name, value in settings.items() if name not in _STATE_OF_A_GROUP} | restored)


@torch.no_grad()  # Megatron-Core 0.16.1 copies into float32 weights without it
def load(place: Path, saved: Manifest, config: RunConfig, state: State, log: Callable[[str], None]) -> None:
    """Set weights, optimizer, schedule and random states from a checkpoint. A collective.

    Settings of the optimizer and the schedule stay those of ``config``.

    Raises:
        ValueError: this layout cannot read its optimizer state.
    """
    check_layout(place, saved, config)
    weights = _describe_weights(place, state.model, log)
    kind = {"distrib_optim_sharding_type": saved.kind}
    optimizer = state.optimizer.sharded_state_dict(weights, is_loading=True, metadata=kind)
    request: dict[str, Any] = {"model": weights, "optimizer": optimizer}
    random = RandomStates.of_this_run()
    here = parts.describe_layout(config, world_size())
    same_place = all(saved.layout[name] == here[name] for name in _PLACES)
    if same_place and saved.random == random.sizes:
        request["random"] = random.parts
    common = read_common(place)
    parts.put_objects(request, common["objects"])
    loaded = dist_checkpointing.load(request, str(place))
    parts.set_weights(state.model, loaded["model"])
    _load_optimizer(state.optimizer, loaded["optimizer"])
    state.scheduler.num_steps = 0  # Megatron-Core adds the loaded steps to it
    state.scheduler.load_state_dict(common["scheduler"])
    if "random" in request:
        parts.set_random_states({name: values.view(-1) for name, values in loaded["random"].items()})
