"""The training loop: step, report, validate, save, until the run ends or a stop is requested."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from genlip_megatron.command import FILE_ERRORS, UserError, one_line
from genlip_megatron.config import RunConfig
from genlip_megatron.device import current_device
from genlip_megatron.faults.exits import EXIT_NOT_SAVED, EXIT_PREEMPTED, LeaveRun, mark_final, say_error, tell_torchrun
from genlip_megatron.faults.stop import StopRequest, describe_votes, warn_if_killed_before_saving
from genlip_megatron.faults.watchdog import Watchdog
from genlip_megatron.log import live, log
from genlip_megatron.train.oom import FIRST_STEPS, out_of_memory
from genlip_megatron.train.report import Tally, bar, report
from genlip_megatron.train.resume import among_best, check_weights, finish_saves, save
from genlip_megatron.train.rollback import roll_back
from genlip_megatron.train.setup import set_up
from genlip_megatron.train.state import Run
from genlip_megatron.train.step import train_step
from genlip_megatron.train.validation import validate


def train(config: RunConfig, watchdog: Watchdog | None = None) -> int:
    """Run to the end of ``config``; returns the exit status.

    Args:
        watchdog: watches the run; the caller closes it.

    Raises:
        UserError: a setting or a file is wrong, or the first steps need more memory than a GPU has.
    """
    run: Run | None = None
    stop: StopRequest | None = None
    began = 0
    try:
        try:
            run = set_up(config, watchdog)
        except (ValueError, *FILE_ERRORS) as error:
            raise UserError(one_line(error)) from error
        if config.log.eval_only:
            validate(run)
            return 0
        # Until here, and throughout --eval-only, a signal ends the process at once.
        stop = StopRequest(config.stop_file, config.train.exit_duration_in_mins)
        began = run.iteration
        return train_steps(run, stop)
    except torch.OutOfMemoryError as error:
        if run is not None and run.iteration - began >= FIRST_STEPS:
            raise
        raise UserError(out_of_memory(config, torch.distributed.get_world_size(), error)) from error
    except LeaveRun as leave:
        assert run is not None
        say_error(str(leave), torch.distributed.get_rank() == 0)
        finish_saves(run)
        return leave.status
    finally:
        if stop is not None:
            stop.close()
        if run is not None:
            run.close()


def train_steps(run: Run, stop: StopRequest) -> int:
    """Train to the end of the configuration or until a stop is requested; returns the exit status.

    Raises:
        LeaveRun: the run cannot continue.
    """
    config, options = run.config, run.config.log
    assert run.train_loader is not None
    if config.parallel.fsdp and config.faults.check_replicas_interval:
        log("replicas are not compared: with parallel.fsdp there are none")
    if _stop_before_the_first_step(stop):
        return EXIT_PREEMPTED
    if run.iteration == 0:
        validate(run)
    batches: Iterator[Any] = iter(run.train_loader)
    last_save, save_ok, tally, stopping = run.iteration, True, Tally(), False
    second_step = run.iteration + 2  # the first may compile
    while run.iteration < config.train.train_iters:
        began = time.monotonic()
        outcome = train_step(run, batches, stop)
        if run.iteration == second_step:
            warn_if_killed_before_saving(time.monotonic() - began)
        run.watchdog.beat()
        tally.add(outcome)
        live(bar(run.iteration, config.train.train_iters, tally))
        stopping = any(outcome.stop)
        if outcome.roll_back and not stopping:
            before = run.iteration
            batches = roll_back(run, batches, outcome.roll_back)
            run.watchdog.beat()
            if run.iteration < before:
                last_save, tally = run.iteration, Tally()
                continue
        if run.saver is not None and run.saver.writing and not outcome.unwritten:
            finish_saves(run)
        exit_due = bool(config.train.exit_interval) and run.iteration % config.train.exit_interval == 0
        last = run.iteration == config.train.train_iters
        at_end = exit_due or last or stopping
        validating = last or (options.eval_interval and run.iteration % options.eval_interval == 0)
        saving = at_end or run.iteration % config.checkpoint.save_interval == 0
        check_weights(run, saving and run.saver is not None)
        if run.iteration % options.log_interval == 0 or at_end or validating or saving:
            report(run, tally)
            if validating and not stopping:
                validate(run)
                if not saving and among_best(run):
                    saving = True
                    check_weights(run, saving)
            if saving and run.iteration != last_save:
                run.watchdog.beat()
                save_ok = save(run, last=at_end)
                run.watchdog.beat()
                last_save = run.iteration
            tally = Tally()
        if at_end:
            break
    if stopping:
        text = f"stop requested by {describe_votes(outcome.stop)}: leaving after step {run.iteration}"
        saved = "the same command resumes" if run.saver else "nothing is saved, because checkpoint.save is not set"
        text += f"; {saved}"
        log(text)
        tell_torchrun(text)
    save_ok = finish_saves(run) and save_ok
    if stopping and not save_ok:
        # Without this torchrun would restart the run despite the stop request: the stop file is gone.
        mark_final(config.checkpoint.save, EXIT_NOT_SAVED, stop_requested=True)
    stop.obey()
    if not save_ok:
        return EXIT_NOT_SAVED
    return EXIT_PREEMPTED if stopping and not (exit_due or last) else 0


def _stop_before_the_first_step(stop: StopRequest) -> bool:
    """Whether any rank already requests a stop; then there is nothing to save. A collective."""
    votes = torch.tensor(stop.votes(), device=current_device())
    torch.distributed.all_reduce(votes)
    if reasons := describe_votes(votes.tolist()):
        log(text := f"stop requested by {reasons}: leaving before the first step, with nothing to save")
        tell_torchrun(text)
        stop.obey()
    return bool(reasons)
