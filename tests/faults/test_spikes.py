"""Steps far above the last steps are spikes; ordinary training has none."""

from __future__ import annotations

import json
import math
import random

from genlip_megatron.faults.spikes import SpikeJudge


def judged(losses: list[float], norms: list[float], window: int = 128) -> list[int]:
    """The steps judged as spikes; they do not enter the history."""
    judge, found = SpikeJudge(window, threshold=10), []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if judge.spike(loss, norm):
            found.append(step)
        else:
            judge.add(loss, norm)
    return found


def ordinary(steps: int) -> tuple[list[float], list[float]]:
    """A loss that falls from 10 to 2 with 2% of noise, and gradient norms with a heavy tail, as in training."""
    draw = random.Random(7)
    losses = [(2 + 8 * math.exp(-step / 300)) * draw.gauss(1, 0.02) for step in range(steps)]
    return losses, [draw.lognormvariate(0, 0.3) for _ in range(steps)]


def test_ordinary_training_has_no_spike() -> None:
    assert judged(*ordinary(5000)) == []


def test_spikes_of_loss_and_of_norm_are_found() -> None:
    losses, norms = ordinary(1000)
    losses[800] *= 2
    norms[700] *= 300
    assert judged(losses, norms) == [700, 800]


def test_a_constant_history_does_not_make_rounding_a_spike() -> None:
    losses, norms = [1e-7] * 200, [0.5] * 200
    losses[150], norms[160] = 2e-7, 0.51
    assert judged(losses, norms) == []
    losses[170], norms[180] = 0.5, 1.0
    assert judged(losses, norms) == [170, 180]


def test_no_spike_before_half_a_window() -> None:
    assert judged([2.0] * 63 + [9.0] + [2.0] * 10, [1.0] * 74) == []
    assert judged([2.0] * 64 + [9.0] + [2.0] * 10, [1.0] * 75) == [64]


def test_state_survives_json() -> None:
    losses, norms = ordinary(50)
    judge, other = SpikeJudge(32, 10), SpikeJudge(32, 10)
    for loss, norm in zip(losses, norms, strict=True):
        judge.add(loss, norm)
    other.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    assert other.spike(99.0, 99.0) == judge.spike(99.0, 99.0) != ""
    assert SpikeJudge(128, 10).spike(99.0, 99.0) == ""
