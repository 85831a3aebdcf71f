"""What a run says: a summary at its head, progress that fits a terminal, and the same in TensorBoard and a file."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util import tensor_util

from genlip_megatron.config import from_dict, override
from genlip_megatron.testing.processes import Zygote
from tests.reliability.training import Training


@pytest.fixture(scope="module")
def training(zygote: Zygote, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run of two ranks and two validation sets, which is resumed after step 3."""
    sets = (f"{demo_data}/val.dataset.json", f"{demo_data}/train.dataset.json")
    flags = {"data__train_data": sets[1:], "data__valid_data": sets, "log__eval_iters": 0, "train__train_iters": 5}
    training = Training(zygote, demo_data, tmp_path_factory.mktemp("log"), 2, flags | {"log__eval_interval": 4})
    for words in (["--exit-interval", "3"], ["--lr", "0.002"]):
        ended = training.go(*words)
        assert [one.code for one in ended] == [0, 0], ended[0].output[-3000:]
        (training.folder / f"output{training.starts}").write_text(ended[0].output)
    return training


def outputs(training: Training) -> list[str]:
    """What rank 0 printed at each start."""
    return [(training.folder / f"output{start}").read_text() for start in (1, 2)]


@pytest.mark.slow
def test_the_head_sums_up_data_machine_and_start(training: Training) -> None:
    first, second = outputs(training)
    assert re.search(
        r"^train data: 160 samples \| \d shards \| [\d,]+ tokens \| 0% refused .* steps an epoch$", first, re.M
    )
    for name, size in (("val", 24), ("train", 160)):
        assert re.search(rf"^validation data {name}: {size} of {size} samples in \d+ batches$", first, re.M)
    assert re.search(r"^device cpu \| precision float32 \| data-parallel ranks 2$", first, re.M)
    assert "WARNING: 160 of 184 validation images are also training images" in first
    assert f"a new run of 5 steps into {training.run}" in first and "a new run" not in second
    assert "train.lr: 0.001 in the checkpoint, 0.002 here" in second or "train.lr" in second
    assert len(first.split("iteration 0 |")[0].splitlines()) < 20


@pytest.mark.slow
def test_the_whole_configuration_is_in_the_folder(training: Training) -> None:
    file = training.run / "config.yaml"
    flags = yaml.safe_load((training.folder / "config1.yaml").read_text())
    assert from_dict(yaml.safe_load(file.read_text()), "file") == override(
        from_dict(flags, "flags"), {"train.lr": 0.002}
    )
    file.write_text("own: file\n")
    assert [one.code for one in training.go()] == [0, 0] and file.read_text() == "own: file\n"


@pytest.mark.slow
def test_progress_lines_fit_a_terminal(training: Training) -> None:
    for output in outputs(training):
        lines = [line for line in output.splitlines() if re.match(r"iteration \d+/|step parts|samples ", line)]
        assert lines and max(map(len, lines)) <= 120
        assert not re.search(r"quarantined|truncated|skipped|spikes", "".join(lines)), (
            "counters that are 0 are left out"
        )
        assert all(re.search(r"\| epoch \d\.\d\d \| lm loss", line) for line in lines if "iteration" in line)
        assert len([line for line in lines if line.startswith("samples ")]) <= 2


@pytest.mark.slow
def test_tensorboard_has_epoch_perplexity_sets_and_settings_once_a_step(training: Training) -> None:
    board = plugin_event_accumulator.EventAccumulator(str(training.folder / "tensorboard")).Reload()

    def curve(tag: str) -> dict[int, float]:
        events = [(event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in board.Tensors(tag)]
        assert len(dict(events)) == len(events), f"{tag} has a step twice"
        return dict(events)

    assert list(curve("epoch")) == list(curve("lm loss")) == [1, 2, 3, 4, 5]
    assert curve("epoch")[5] == pytest.approx(curve("consumed-samples")[5] / 160)
    loss = curve("lm loss validation")
    assert list(loss) == [0, 4, 5]
    assert curve("lm loss validation ppl")[5] == pytest.approx(math.exp(loss[5]), rel=1e-4)
    parts = [curve(f"lm loss validation/{name}")[5] for name in ("val", "train")]
    assert min(parts) <= loss[5] <= max(parts)
    texts = [
        tensor_util.make_ndarray(event.tensor_proto)[0].decode()
        for event in board.Tensors("configuration/text_summary")
    ]
    assert "    lr: 0.002" in texts[1]
