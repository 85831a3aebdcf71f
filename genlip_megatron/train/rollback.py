"""Rollback: go back to the newest good checkpoint and skip the data since."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from genlip_megatron.faults.exits import EXIT_BAD_NUMBERS, LeaveRun
from genlip_megatron.log import log
from genlip_megatron.train.resume import finish_saves, rewind
from genlip_megatron.train.state import Run


def roll_back(run: Run, batches: Any, reason: str) -> Iterator[Any]:
    """Load the newest good checkpoint and skip the data since, up to and including this step's. A collective.

    Afterwards ``run.iteration`` and the loader's step differ by the skipped steps; the order of the data and DropPath
    follow the loader's step. After a spike, without a checkpoint, nothing changes.

    Returns:
        the micro-batches to continue with.

    Raises:
        LeaveRun: too many bad steps without ``--on-spike rollback`` or a checkpoint, or too many rollbacks.
    """
    loader, options, step = run.train_loader, run.config.faults, run.iteration
    assert loader is not None
    too_many_bad_steps = run.verdicts.without_update >= options.max_bad_steps
    if too_many_bad_steps and options.on_spike != "rollback":
        raise LeaveRun(
            EXIT_BAD_NUMBERS,
            f"step {step}: {reason}. Look at the data of these steps, lower train.lr, or use --on-spike rollback to go "
            "back to the last checkpoint",
        )
    finish_saves(run)
    # The ranks that share micro-batches must give their loader threads the same plan.
    batches.close()
    seen, before = loader.step, run.verdicts.state_dict()
    back = rewind(run)
    if back is None:
        if too_many_bad_steps:
            raise LeaveRun(
                EXIT_BAD_NUMBERS,
                f"step {step}: {reason}, and there is no checkpoint to go back to. Look at the data of these steps, or "
                "lower train.lr",
            )
        log(f"{reason}: no checkpoint to go back to yet; only its update was skipped")
        return iter(loader)
    run.verdicts.count_rollback(back, before)
    if run.verdicts.rollbacks > options.max_rollbacks:
        raise LeaveRun(
            EXIT_BAD_NUMBERS,
            f"step {step}: {reason}, after {run.verdicts.rollbacks - 1} rollbacks since the checkpoint of step {back} "
            "(faults.max_rollbacks). Look at the data since then, or lower train.lr",
        )
    if run.writer is not None:
        run.writer.rewind(back)
    first = loader.step + 1
    loader.skip(seen - loader.step)
    run.counts.zero_()
    log(
        f"ROLLBACK {run.verdicts.rollbacks} of at most {options.max_rollbacks}: {reason}; back from step {step} to the "
        f"checkpoint of step {back}; the data of steps {first} to {seen} are skipped for good"
    )
    return iter(loader)
