"""The verdict on a step: good, bad or a spike; and the counters of such steps.

* Bad: a loss or a gradient is not finite. The update is skipped.
* Spike: the loss or the gradient norm is far above the last ones. ``faults.on_spike`` decides: the run makes the
  update, skips it, or rolls back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from genlip_megatron.config import FaultsConfig
from genlip_megatron.faults.spikes import SpikeJudge
from genlip_megatron.log import warn
from genlip_megatron.train.statistics import Statistics

_COUNTERS = ("skipped", "spikes", "without_update", "rollbacks", "back_at")


@dataclass(frozen=True)
class Verdict:
    """``kind`` is "good", "bad" or "spike"; ``update`` says whether the weights may change."""

    kind: str
    reason: str
    update: bool


@dataclass(frozen=True)
class Outcome(Statistics):
    """The result of a step, the same on all ranks.

    Attributes:
        verdict: "good", "bad" or "spike".
        updated: whether the weights changed.
        roll_back: why the run should go back to its last checkpoint; empty when it need not.
    """

    verdict: str
    updated: bool
    roll_back: str


class Verdicts:
    """Judges the steps of a run and counts them.

    Attributes:
        skipped: steps without an update since the run began.
        spikes: spikes since the run began, with or without an update.
        without_update: steps without an update in a row, up to now.
        rollbacks: rollbacks in a row without a newer checkpoint in between.
        back_at: step of the checkpoint that the last rollback went to; -1 before any.
    """

    def __init__(self, options: FaultsConfig) -> None:
        self.options = options
        self.spike_judge = SpikeJudge(options.spike_window, options.spike_threshold)
        self.skipped = self.spikes = self.without_update = self.rollbacks = 0
        self.back_at = -1

    def judge(self, statistics: Statistics) -> Verdict:
        """Judge a step by its statistics. Changes nothing."""
        if not statistics.finite:
            return Verdict("bad", f"loss {statistics.loss:.4g}, gradient norm {statistics.grad_norm:.4g}", False)
        if reason := self.spike_judge.spike(statistics.loss, statistics.grad_norm):
            return Verdict("spike", reason, self.options.on_spike == "warn")
        return Verdict("good", "", True)

    def count(self, step: int, statistics: Statistics, verdict: Verdict) -> Outcome:
        """Count a step whose update was made or skipped, according to ``verdict``."""
        if verdict.update:
            self.spike_judge.add(statistics.loss, statistics.grad_norm)
        spike = verdict.kind == "spike"
        self.spikes += spike
        self.skipped += not verdict.update
        self.without_update = 0 if verdict.update else self.without_update + 1
        if verdict.reason:
            done = "the update is made" if verdict.update else f"no update ({self.without_update} in a row)"
            warn(f"step {step}: {verdict.kind}: {verdict.reason}; {done}")
        roll_back = f"a spike in step {step}" if spike and self.options.on_spike == "rollback" else ""
        if self.without_update >= self.options.max_bad_steps:
            roll_back = f"{self.without_update} steps in a row without an update (faults.max_bad_steps)"
        return Outcome(**vars(statistics), verdict=verdict.kind, updated=verdict.update, roll_back=roll_back)

    def count_rollback(self, step: int, before: dict[str, Any]) -> None:
        """Count a rollback to the checkpoint of ``step``, whose state has been loaded.

        Args:
            before: ``state_dict`` before it was loaded. Skipped steps and spikes stay counted.
        """
        self.skipped, self.spikes, self.without_update = before["skipped"], before["spikes"], 0
        self.rollbacks = before["rollbacks"] + 1 if step <= before["back_at"] else 1
        self.back_at = step

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for a checkpoint."""
        return {**self.spike_judge.state_dict(), **{name: getattr(self, name) for name in _COUNTERS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; checkpoints of older versions lack some counters."""
        self.spike_judge.load_state_dict(state)
        for name in _COUNTERS:
            setattr(self, name, state.get(name, getattr(self, name)))
