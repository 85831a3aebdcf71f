"""A run's checkpoints: loading, saving and going back to one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from genlip_megatron.checkpoint import changes, loading, parts, paths
from genlip_megatron.checkpoint.collectives import gather, on_rank_0
from genlip_megatron.checkpoint.manifest import DP_RESHARDABLE, FULLY_RESHARDABLE, WEIGHTS_ONLY, Manifest
from genlip_megatron.checkpoint.parts import State
from genlip_megatron.checkpoint.paths import NotSaved
from genlip_megatron.checkpoint.saving import Facts, Saver
from genlip_megatron.config import RunConfig, override
from genlip_megatron.data.loader import merge_cursors
from genlip_megatron.faults.replicas import check_replicas
from genlip_megatron.log import log
from genlip_megatron.model.fp8_state import share_largest_values
from genlip_megatron.model.genlip import unwrap
from genlip_megatron.train import drills
from genlip_megatron.train.state import Run

_PATIENCE = 120.0  # seconds to wait until an earlier process leaves the folder


def _state(run: Run) -> State:
    return State(run.model, run.optimizer, run.scheduler)


def make_saver(run: Run) -> Saver | None:
    """The run's saver; None without ``checkpoint.save``."""
    if not run.config.checkpoint.save or run.train_loader is None:
        return None
    return Saver(run.config, _state(run), log, lambda step: drills.fail_save(run, step), patience=_PATIENCE)


def load(run: Run) -> None:
    """Resume from the newest good checkpoint of ``checkpoint.save``, else load ``checkpoint.load``, else start new.

    The same command therefore resumes a run, even one that began from another run's weights. A collective.

    Raises:
        ValueError: no good checkpoint, or one that does not fit the configuration.
    """
    options, whole = run.config.checkpoint, run.config.checkpoint.verify == "full"
    if run.saver is not None and (found := loading.find(options.save, whole, log)):
        _resume(run, *found)
        if moved := _set_aside(run):
            log("WARNING: later checkpoints, which this run does not continue, are now " + ", ".join(map(str, moved)))
        return
    # The command of a run, with --eval-only added, validates that run.
    source = options.load or (options.save if run.config.log.eval_only else "")
    if not source:
        return
    found = loading.find(source, whole, log)
    if found is None:
        if options.load != options.save or run.config.log.eval_only:
            raise ValueError(
                f"checkpoint.{'load' if options.load else 'save'} = {source}: no folder iter_NNNNNNN in it. Name a "
                "folder with a checkpoint"
            )
        log(f"no checkpoint in {options.load} yet: starting a new run")
    elif options.finetune or run.config.log.eval_only:
        _take_weights(run, *found)
    else:
        _resume(run, *found)


def _set_aside(run: Run) -> list[Path]:
    root = run.config.checkpoint.save
    try:
        moved: list[Path] = on_rank_0(lambda: paths.set_aside(root, run.iteration))
        return moved
    except NotSaved as error:
        raise ValueError(f"checkpoint.save = {root}: {error}. Move later checkpoints out of the folder") from None


def _take_weights(run: Run, place: Path, saved: Manifest) -> None:
    differing = changes.model_differences(loading.read_config(place), run.config, same_run=False)
    _refuse(place, differing + _tokenizer_differences(run, saved))
    loading.load_weights(place, run.model, log)
    run.optimizer.reload_model_params()
    if run.config.log.eval_only:
        run.iteration = saved.iteration
    else:
        log(f"weights of step {saved.iteration} from {place}; optimizer, schedule and data start new")


def _resume(run: Run, place: Path, saved: Manifest) -> None:
    """Set the whole run from a checkpoint."""
    assert run.train_loader is not None
    if saved.kind == WEIGHTS_ONLY:
        raise ValueError(
            f"{place} holds weights only and cannot be resumed. Start a new run from it with "
            f"--load {place.parent} --finetune, and --save another folder"
        )
    config, theirs = run.config, loading.read_config(place)
    common = loading.read_common(place)
    data = run.train_loader.plan.differences(common["data"]["plan"])
    hint = " (--change-data restarts the data and keeps the rest)"
    differing = changes.model_differences(theirs, config, same_run=True) + _tokenizer_differences(run, saved)
    if not config.data.change_data:
        differing += changes.data_differences(theirs, config, bool(data)) + [line + hint for line in data]
    _refuse(place, differing)
    # Before the weights, which take time: the data state may be refused too.
    if data:
        run.train_loader.restart()
    else:
        run.train_loader.load_state_dict(common["data"])
    loading.load(place, saved, config, _state(run), log)
    run.iteration = saved.iteration
    run.consumed_samples, run.consumed_tokens = common["consumed_samples"], common["consumed_tokens"]
    run.verdicts.load_state_dict(common["guard"])
    if data:
        log("the data restarts: " + "; ".join(data))
    if changed := changes.accepted_changes(*_in_precision(saved, theirs, config)):
        log("settings that differ from the checkpoint's: " + "; ".join(changed))
    log(f"resumed at step {run.iteration} from {place}")


def _in_precision(saved: Manifest, theirs: RunConfig, config: RunConfig) -> list[RunConfig]:
    """Both configurations, with "auto" precision replaced by its meaning."""
    here: dict[str, Any] = parts.describe_layout(config, 1)
    return [
        override(theirs, {"train.precision": saved.layout.get("precision", here["precision"])}),
        override(config, {"train.precision": here["precision"]}),
    ]


def _refuse(place: Path, differing: list[str]) -> None:
    if differing:
        raise ValueError(f"{place} does not fit this run: " + "; ".join(differing))


def _tokenizer_differences(run: Run, saved: Manifest) -> list[str]:
    loader = run.train_loader or run.valid_loader
    here = loader.tokenizer.fingerprint if loader is not None else saved.tokenizer
    return [] if here == saved.tokenizer else [f"data.tokenizer: {saved.tokenizer} in the checkpoint, {here} here"]


def rewind(run: Run) -> int | None:
    """Load the newest good checkpoint of ``checkpoint.save``; returns its step, or None without one.

    The loader must not be iterating. A collective.
    """
    finish_saves(run)
    found = loading.find(run.config.checkpoint.save, True, log) if run.config.checkpoint.save else None
    if found is None:
        return None
    _resume(run, *found)
    return run.iteration


def gather_weights(run: Run) -> None:
    """Complete every rank's weights; with ``overlap_param_gather`` the next forward pass would do it."""
    if run.config.parallel.overlap_param_gather:
        for chunk in run.model:
            chunk.start_param_sync(force_sync=True)


def check_weights(run: Run, saving: bool) -> None:
    """Compare the weights of replicas every ``faults.check_replicas_interval`` steps and before each save.

    A collective over all ranks.

    Raises:
        LeaveRun: they differ.
    """
    interval = run.config.faults.check_replicas_interval
    if not interval or not (saving or run.iteration % interval == 0) or run.config.parallel.fsdp:
        return
    gather_weights(run)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    check_replicas(
        (
            (f"stage {stage} chunk {i} {name}", parameter)
            for i, chunk in enumerate(run.model)
            for name, parameter in unwrap(chunk).named_parameters()
        ),
        run.iteration,
    )


def among_best(run: Run) -> bool:
    """Whether ``checkpoint.keep_best`` would keep a checkpoint of the step that was just validated. A collective."""
    step, loss = run.validated
    return run.saver is not None and step == run.iteration and run.saver.among_best(loss)


def save(run: Run, last: bool = False) -> bool:
    """Save the run's state if ``checkpoint.save`` is set; returns False if that failed. Training may continue.

    Args:
        last: the last save of this launch. It has a form that any layout loads, and is written before this returns.
    """
    if run.saver is None:
        return True
    assert run.train_loader is not None
    options = run.config.checkpoint
    finish_saves(run)  # its failure does not affect this save
    gather_weights(run)
    share_largest_values(map(unwrap, run.model))
    cursors = gather(run.train_loader.state_dict(), parallel_state.get_data_parallel_group())
    common: dict[str, Any] = {
        "data": merge_cursors(cursors),
        "consumed_samples": run.consumed_samples,
        "consumed_tokens": run.consumed_tokens,
        "guard": run.verdicts.state_dict(),  # the key of every earlier checkpoint
    }
    every = options.save_interval * options.fully_reshardable_every
    whole = last or (every > 0 and run.iteration % every == 0)
    step, loss = run.validated
    loader = run.train_loader
    facts = Facts(loader.tokenizer.fingerprint, loader.plan.fingerprint, loss if step == run.iteration else None)
    kind = FULLY_RESHARDABLE if whole else DP_RESHARDABLE
    behind = options.async_save and not whole
    return _succeeds(partial(run.saver.save, run.iteration, common, kind, facts, behind=behind))


def finish_saves(run: Run) -> bool:
    """Complete the save in progress; returns False if it failed. A collective."""
    return run.saver is None or _succeeds(run.saver.finish)


def _succeeds(save: Callable[[], None]) -> bool:
    try:
        save()
    except NotSaved as error:
        log(f"WARNING: NOT SAVED: {error}")
        return False
    return True
