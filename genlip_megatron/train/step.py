"""One training step."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.faults.stop import NO_STOP_VOTES, StopRequest
from genlip_megatron.train import drills
from genlip_megatron.train.forward_backward import forward_backward
from genlip_megatron.train.gradients import clip_gradients, global_norm, loss_and_gradients_finite, zero_gradients
from genlip_megatron.train.rerun import Replay, rerun
from genlip_megatron.train.state import Run
from genlip_megatron.train.statistics import all_reduce_statistics
from genlip_megatron.train.verdict import Outcome


def train_step(run: Run, batches: Iterator[PackedBatch], stop: StopRequest | None = None) -> Outcome:
    """Train step ``run.iteration + 1`` and count it. A collective over all ranks; the outcome is the same on each.

    A step without an update leaves weights, moments, schedule and FP8 scales as they were, bit for bit.

    Args:
        batches: this rank's micro-batches.
        stop: this rank's request to stop the run.
    """
    step, source = run.iteration + 1, batches
    run.injector.at("step", step)
    if run.config.faults.rerun_bad_steps:
        source = Replay(batches)

    def compute(second_pass: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        zero_gradients(run)
        spoil = drills.spoils_loss(run, step, second_pass)
        loss = forward_backward(run, source, counted=not second_pass, spoil=spoil)
        with run.breakdown.part("optimizer"):
            run.optimizer.prepare_grads()  # it reports overflow, which only a loss scale causes
            drills.spoil_gradients(run, step)
            finite = loss_and_gradients_finite(loss, run.optimizer)
            return loss, global_norm(run.optimizer), finite  # on the device: the host has not waited yet

    with run.profiler.step(step), run.breakdown.step():
        run.fp8_snapshot.take()
        loss, grad_norm, finite = compute()

        # The only wait for the device. Votes are read as late as possible, so a signal during this step counts.
        votes = stop.votes() if stop else NO_STOP_VOTES
        unwritten = run.saver is not None and not run.saver.written
        statistics = all_reduce_statistics(loss, grad_norm, finite, votes, unwritten)

        if not statistics.finite and isinstance(source, Replay):
            statistics = rerun(run, step, source, compute, loss, statistics)

        verdict = run.verdicts.judge(statistics)
        if verdict.update:
            with run.breakdown.part("optimizer"):
                clip_gradients(run.optimizer, statistics.grad_norm)
                run.optimizer.step_with_ready_grads()
                run.scheduler.step(increment=1)
        else:
            run.fp8_snapshot.restore()  # an infinite value would spoil the scale until it leaves the amax history
        outcome = run.verdicts.count(step, statistics, verdict)

    drills.flip_weight(run, step)
    run.iteration = step
    return outcome
