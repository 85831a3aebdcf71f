"""``checkpoint.keep_best`` keeps the best validation, whatever the intervals of validations and saves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from genlip_megatron.checkpoint import manifest, paths
from genlip_megatron.testing.processes import Zygote
from tests.reliability.training import Training


@pytest.mark.slow
@pytest.mark.parametrize("keep_best", [0, 1, 2])
def test_the_best_validations_are_saved_and_kept(
    keep_best: int, zygote: Zygote, demo_data: Path, tmp_path: Path
) -> None:
    """Saves fall on step 5, validations on 2, 4, 6 and 8; the loss falls, then rises; the run resumes after step 5."""
    flags = {
        "data__valid_data": (f"{demo_data}/val-*.tar",),
        "log__eval_interval": 2,
        "checkpoint__save_interval": 5,
        "checkpoint__keep_last": 1,
        "checkpoint__keep_best": keep_best,
        "checkpoint__async_save": False,
        "train__train_iters": 9,
        "train__lr": 0.05,
        "train__lr_warmup_iters": 8,
    }
    training = Training(zygote, demo_data, tmp_path, 2, flags)
    output = ""
    for words in (["--exit-interval", "5"], []):
        ended = training.go(*words)
        assert [one.code for one in ended] == [0, 0], ended[0].output[-3000:]
        output += ended[0].output
    found = re.findall(r"iteration (\d+) \| validation loss ([\d.]+)", output)
    losses = {int(step): float(loss) for step, loss in found if step != "0"}
    assert list(losses) == [2, 4, 6, 8, 9] and min(losses, key=losses.__getitem__) not in (2, 9), losses
    wanted: dict[int, float] = {}
    for step, loss in losses.items():
        if sum(other <= loss for other in wanted.values()) < keep_best:
            wanted[step] = loss
    saved = {int(step) for step in re.findall(r"saved .*iter_0*(\d+):", output)}
    assert saved == {*wanted, 5, 9}
    kept = {step: manifest.read(paths.step_folder(training.run, step)) for step in paths.steps(training.run)}
    best = sorted(losses, key=losses.__getitem__)[:keep_best]
    assert kept.keys() == {9, *best}
    assert all(kept[step].validation_loss == pytest.approx(losses[step], abs=1e-4) for step in best)
