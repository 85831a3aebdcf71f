"""Saving a run's state to a new checkpoint, while training waits or in the background."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from genlip_megatron.checkpoint import lock, manifest, parts, paths
from genlip_megatron.checkpoint.collectives import (
    everywhere,
    first_of,
    gather,
    gather_on_rank_0,
    lowest,
    on_rank_0,
    rank,
)
from genlip_megatron.checkpoint.manifest import COMMON, CONFIG, FULLY_RESHARDABLE, Manifest
from genlip_megatron.checkpoint.parts import RandomStates, State
from genlip_megatron.checkpoint.paths import NotSaved
from genlip_megatron.checkpoint.retention import Keeper
from genlip_megatron.checkpoint.write import HostCopies, PlannedWrite, Planner, WriteBehind, Written, in_background
from genlip_megatron.config import RunConfig
from genlip_megatron.model.specs import compute_dtype

_PATIENCE_FOR_DELETIONS = 10.0  # seconds


@dataclass(frozen=True)
class Facts:
    """Facts about a run for the manifest, besides its configuration."""

    tokenizer: str = ""
    data: str = ""
    validation_loss: float | None = None


def check_free_space(root: str | Path, config: RunConfig, parameters: int) -> None:
    """Raise ValueError if ``root`` cannot be created or has no room for a checkpoint of ``parameters`` parameters."""
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise ValueError(f"checkpoint.save = {root}: {error}. Choose a folder that can be written to") from None
    needed = parameters * (compute_dtype(config).itemsize + 12)  # weights; master weights, two moments in float32
    if free < needed:
        raise ValueError(
            f"checkpoint.save = {root}: {free / 1e9:.2f} GB free, but a checkpoint of {parameters} parameters "
            f"takes {needed / 1e9:.2f} GB. Free some space or choose another folder"
        )


@dataclass
class _Pending:
    """A save whose files are being written."""

    manifest: Manifest  # without files
    planned: PlannedWrite | None  # None when planning failed on this rank
    written: WriteBehind | Written
    common: dict[str, Any]  # values that are the same on every rank
    objects: dict[str, Any]  # values that this rank adds to them, by key
    gathering: float  # seconds until the tensors were gathered
    stopped: float  # seconds that training has waited


class Saver:
    """Saves a run's state, one save at a time. Every method is a collective over all ranks unless it says otherwise.

    It holds the lock of the folder of checkpoints from its constructor, also a collective, until ``close``.

    Args:
        config: of the run; checkpoints go to ``checkpoint.save``.
        state: the objects to save.
        log: prints a line on rank 0.
        before_writing: called on each rank with the step before it writes; an error fails the save.
        recorded: the configuration to record in checkpoints, if not ``config``.
        patience: seconds to wait for another process to release the folder.

    Raises:
        ValueError: the folder cannot be written to, is not the same for all ranks, or another process saves to it.
    """

    def __init__(
        self,
        config: RunConfig,
        state: State,
        log: Callable[[str], None],
        before_writing: Callable[[int], None] = lambda step: None,
        recorded: RunConfig | None = None,
        patience: float = 0.0,
    ) -> None:
        self.config, self.state, self._log, self._before_writing = config, state, log, before_writing
        self.root = Path(config.checkpoint.save)
        self._pending: _Pending | None = None
        self._planners: dict[str, Planner] = {}
        self._copies = HostCopies()
        self._keeper = Keeper()
        self._pruning: Future[str] | None = None
        self._prune_more = False  # a checkpoint was added since deletions began
        self._recorded = recorded or config
        self._versions = manifest.versions()
        self._revision = manifest.revision() if rank() == 0 else ""
        self._lock: IO[str] | None = None
        optimizers = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
        self._optimizers = [part for part in optimizers if not part.is_stub_optimizer]
        self._hooks = [part.optimizer.register_step_pre_hook(self.wait_for_copy) for part in self._optimizers]
        try:
            text = on_rank_0(lambda: self._acquire(patience))
            strangers = first_of(gather(lock.why_not_shared(self.root, text)))
        except NotSaved as error:
            strangers = str(error)
        if strangers:
            raise ValueError(f"checkpoint.save = {self.root}: {strangers}")

    def _acquire(self, patience: float) -> str:
        self._lock, text = lock.acquire(self.root, patience, self._log)
        paths.clean(self.root)
        return text

    @property
    def writing(self) -> bool:
        """Whether a save is in progress; the same on every rank."""
        return self._pending is not None

    @property
    def written(self) -> bool:
        """Whether this rank's files are written, or no save is in progress. Not a collective."""
        pending = self._pending
        return pending is None or isinstance(pending.written, Written) or pending.written.result.done()

    def among_best(self, loss: float) -> bool:
        """Whether ``checkpoint.keep_best`` would keep a checkpoint of this validation loss. A collective."""
        found: bool = on_rank_0(lambda: self._among_best(loss))
        return found

    def _among_best(self, loss: float) -> bool:
        most, losses = self.config.checkpoint.keep_best, []
        if not most or not math.isfinite(loss):
            return False
        if self._pending is not None:
            losses.append(self._pending.manifest.validation_loss)
        for step in paths.steps(self.root):
            with contextlib.suppress(manifest.Damaged):
                losses.append(manifest.read(paths.step_folder(self.root, step)).validation_loss)
        return sum(other is not None and other <= loss for other in losses) < most

    def save(
        self,
        iteration: int,
        common: dict[str, Any],
        kind: str,
        facts: Facts,
        behind: bool = False,
        random: RandomStates | None = None,
    ) -> None:
        """Save the run's state after a step.

        Args:
            common: values that are the same on every rank (counters, data cursor); only rank 0's are written.
            kind: of the optimizer's state, DP_RESHARDABLE or FULLY_RESHARDABLE.
            facts: for the manifest.
            behind: copy and write in the background. The next optimizer update waits for the copy; nothing else may
                change the state before. ``finish`` completes the save.
            random: of all ranks; by default the current states.

        Raises:
            NotSaved: this save failed, or an earlier one failed and this one has not begun. Call ``finish`` first to
                tell them apart.
        """
        self.finish()
        begin = time.monotonic()
        kind = FULLY_RESHARDABLE if self.config.parallel.fsdp else kind
        planner = self._planner(kind)
        try:
            place = on_rank_0(lambda: self._prepare(iteration))
            # Copied because the next step changes these values.
            common = everywhere(lambda: copy.deepcopy(common))
            gathering = time.monotonic()
            if kind == FULLY_RESHARDABLE:
                # Gathering waits for other ranks, so an error in it must end this process, and so the launch.
                everywhere(self._check_host_memory)
                sharded, plain, objects, random = self._collect(kind, random)
            else:
                sharded, plain, objects, random = everywhere(lambda: self._collect(kind, random))
            gathering = time.monotonic() - gathering
            # A new plan is a collective.
            if not lowest(planner.knows(sharded)):
                planner.prepare(sharded)
        except NotSaved as error:
            raise NotSaved(self._failed(iteration, str(error))) from None
        new = Manifest(
            iteration=iteration,
            kind=kind,
            layout=parts.describe_layout(self._recorded, random.world_size),
            validation_loss=facts.validation_loss,
            tokenizer=facts.tokenizer,
            data=facts.data,
            random=random.sizes,
            versions=self._versions,
            revision=self._revision,
        )
        common = {**common, **plain, "iteration": iteration}
        planned, written = self._write(planner, sharded, place, behind, iteration)
        stopped = time.monotonic() - begin
        self._pending = _Pending(new, planned, written, common, objects, gathering, stopped)
        if behind:
            self._log(f"saving step {iteration} in the background; training waited {stopped:.2f} s so far")
        else:
            self.finish()

    def _check_host_memory(self) -> None:
        """Raise MemoryError if this machine lacks memory for its ranks to gather float32 weights and two moments.

        Not a collective.
        """
        parameters = sum(p.numel() for chunk in self.state.model for p in chunk.parameters())
        needed = 12 * parameters * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if (free := psutil.virtual_memory().available) < needed:
            raise MemoryError(
                f"gathering takes {needed / 1e9:.2f} GB of host memory here, and {free / 1e9:.2f} GB are free"
            )

    def _collect(
        self, kind: str, random: RandomStates | None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], RandomStates]:
        """(tensors, values of every rank, objects of this rank, random states) of the run's state.

        FULLY_RESHARDABLE state is gathered from other ranks.
        """
        # The first update creates moments; there may not have been one.
        if not self.config.parallel.fsdp:
            for part in self._optimizers:
                part.init_state_fn(part.optimizer, part.config)
        weights = parts.weights_of(self.state.model)
        optimizer = self.state.optimizer.sharded_state_dict(weights, metadata={"distrib_optim_sharding_type": kind})
        parts.clear_padding(optimizer)
        random = random or RandomStates.of_this_run()
        state, objects = parts.take_objects({"model": weights, "optimizer": optimizer, "random": random.parts})
        sharded, plain = save_preprocess(state, validate_access_integrity=False)
        plain["scheduler"] = self.state.scheduler.state_dict()
        # Copied because the next step changes these values.
        return sharded, copy.deepcopy(plain), copy.deepcopy(objects), random

    def _write(
        self, planner: Planner, sharded: dict[str, Any], place: Path, behind: bool, iteration: int
    ) -> tuple[PlannedWrite | None, WriteBehind | Written]:
        """Write this rank's files, or start to; never raises, because the other ranks wait for the result."""
        try:
            planned = planner.plan(sharded, place)
            self._before_writing(iteration)
        except Exception as error:
            return None, Written(error=f"{type(error).__name__}: {error}")
        if not behind:
            return planned, planned.write()
        try:
            return planned, WriteBehind(self._copies, planned)
        except Exception as error:  # no thread, or a device error
            warning = f"training waited for the disk ({type(error).__name__}: {error})"
            return planned, replace(planned.write(), warning=warning)

    def wait_for_copy(self, *_: Any) -> None:
        """Wait until a save in progress allows the state to change. Optimizers call it before each update.

        Not a collective.
        """
        pending = self._pending
        if pending is not None and isinstance(pending.written, WriteBehind):
            begin = time.monotonic()
            pending.written.wait_for_copy()
            pending.stopped += time.monotonic() - begin

    def finish(self) -> None:
        """Complete a save in progress and publish the checkpoint.

        Raises:
            NotSaved: it could not be written; its files are removed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        written = pending.written if isinstance(pending.written, Written) else pending.written.result.result()
        written = replace(written, stopped=pending.stopped)
        everyone = gather_on_rank_0((written, pending.objects))
        try:
            text = on_rank_0(lambda: self._commit(pending, *zip(*everyone, strict=True)))
        except NotSaved as error:
            raise NotSaved(self._failed(pending.manifest.iteration, str(error))) from None
        self._log(text)

    def _failed(self, iteration: int, why: str) -> str:
        """Remove the files of a failed save; returns the message."""
        if rank() == 0:
            shutil.rmtree(paths.partial_folder(self.root, iteration), ignore_errors=True)
        return (
            f"the checkpoint of step {iteration} could not be written to {self.root}: {why}. Earlier ones are untouched"
        )

    def settle(self, seconds: float | None = None) -> None:
        """Wait up to ``seconds`` for deletions in progress, and log their result. Not a collective."""
        if self._pruning is not None and wait([self._pruning], seconds).done:
            pruning, self._pruning = self._pruning, None
            if text := pruning.result():
                self._log(text)

    def close(self) -> None:
        """Release the folder; long deletions continue until the process ends. Not a collective."""
        self.wait_for_copy()
        for hook in self._hooks:
            hook.remove()
        self.settle(_PATIENCE_FOR_DELETIONS)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                if self._pruning is None and self._pending is None:
                    paths.clean(self.root)  # remains of failed deletions
                self._lock.close()

    def _prepare(self, iteration: int) -> Path:
        self.settle(0.0 if self._keeper.reading else None)  # a deletion is short and frees space
        place = paths.partial_folder(self.root, iteration)
        self.root.mkdir(parents=True, exist_ok=True)
        if self._pruning is None:
            paths.clean(self.root)
        place.mkdir()
        return place

    def _planner(self, kind: str) -> Planner:
        if kind not in self._planners:
            self._planners[kind] = Planner(parallel_state.get_data_parallel_group(with_context_parallel=True))
        return self._planners[kind]

    def _commit(self, pending: _Pending, written: Sequence[Written], objects: Sequence[dict[str, Any]]) -> str:
        """On rank 0: write the other files, the manifest last, and publish; returns the text to log."""
        if errors := first_of([part.error for part in written]):
            raise NotSaved(errors)
        assert pending.planned is not None
        begin, step = time.monotonic(), pending.manifest.iteration
        place, target = paths.partial_folder(self.root, step), paths.step_folder(self.root, step)
        pending.planned.finish([part.results for part in written])
        save_config(CheckpointingConfig("torch_dist", 1), str(place))
        paths.sync(place / "metadata.json")
        common = io.BytesIO()
        together = {key: value for some in objects for key, value in some.items()}
        torch.save({**pending.common, "objects": together}, common)
        paths.write_file(place / COMMON, common.getvalue())
        paths.write_file(place / CONFIG, self._recorded.to_yaml().encode())
        files = {name: facts for part in written for name, facts in part.files.items()}
        for name in (".metadata", "metadata.json", COMMON, CONFIG):
            files[name] = manifest.facts_of(place / name)
        saved = replace(pending.manifest, created=manifest.now(), files=files)
        paths.write_file(place / manifest.MANIFEST, saved.to_bytes())
        warnings = [first_of([part.warning for part in written])]
        if os.path.lexists(target) and (other := manifest.foreign(target)):
            warnings.append(f"{target} was no checkpoint of a run ({other}); it is now {paths.move_aside(target)}")
        paths.publish(self.root, step)
        try:
            paths.confirm(self.root, step)
        except OSError as error:  # loading does not need the pointer
            warnings.append(f"the checkpoint is complete, but {paths.LATEST} may name an older one: {error}")
        self._keeper.trust(target, saved)
        self._prune_more = True
        self.settle(0.0)
        if self._pruning is None:
            self._pruning = in_background(self._prune)
        stopped, copying, seconds, hashing = (
            max(getattr(part, name) for part in written) for name in ("stopped", "copying", "seconds", "hashing")
        )
        return (
            f"saved {target}: {saved.size / 1e9:.3f} GB, {saved.kind}; training waited {stopped:.2f} s"
            + (f" ({pending.gathering:.2f} s to gather)" if saved.kind == FULLY_RESHARDABLE else "")
            + (f", copied in {copying:.2f} s" if copying else "")
            + f", written in {seconds:.2f} s at {saved.size / 1e9 / max(seconds, 1e-9):.2f} GB/s "
            f"({hashing / max(seconds, 1e-9):.0%} of it checksums), completed in {time.monotonic() - begin:.2f} s"
            + "".join(f"\nWARNING: {warning}" for warning in warnings if warning)
        )

    def _prune(self) -> str:
        gone: list[int] = []
        wrong: list[str] = []
        try:
            while self._prune_more:
                self._prune_more = False
                deleted, wrong = self._keeper.prune(self.root, self.config.checkpoint)
                gone += deleted
        except Exception as error:  # an exception in this thread would be lost
            return f"WARNING: old checkpoints in {self.root} could not be deleted: {error}"
        lines = [f"WARNING: damaged checkpoint, not counted: {problem}" for problem in wrong]
        lines += [f"WARNING: {line}" for line in self._keeper.left]
        if gone:
            lines.append(f"deleted the checkpoints of steps {', '.join(map(str, gone))}")
        return "\n".join(lines)
