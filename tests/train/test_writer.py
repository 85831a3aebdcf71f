"""Logs show each step once, also after crashes and rollbacks; a log that cannot be written is a user error."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.util import tensor_util

from genlip_megatron.config import RunConfig, override
from genlip_megatron.faults.exits import EXIT_USER_ERROR
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.processes import Ended, Zygote
from genlip_megatron.testing.runs import failing_set_up, tiny_config
from genlip_megatron.train.writer import WANDB_FILE, Writer
from tests.train.test_verdict import settings, trained

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
KEY = "0123456789" * 4


def log(writer: Writer, after: int, *steps: int) -> None:
    """Write scalars of each step and an image with text every tenth; both name their run."""
    for step in steps:
        writer.scalars({"lm loss": step + after / 100}, step)
        if step % 10 == 0:
            writer.caption(0, torch.full((3, 2, 2), step, dtype=torch.uint8), f"{step} after {after}", step)
    writer._board.flush()


def begun(folder: Path, after: int, **flags: Any) -> Writer:
    """The writer of a run that continues after a step. It is never closed, as after a crash."""
    config = {"checkpoint.save": str(folder), **{name.replace("__", "."): value for name, value in flags.items()}}
    writer = Writer(override(RunConfig(), config), active=True)
    writer.begin(after)
    return writer


def shown(folder: Path) -> tuple[list[tuple[int, float]], list[tuple[int, str]]]:
    """(scalars, texts), each with its step, that TensorBoard shows of a run. Images have the steps of the texts."""
    plain = event_accumulator.EventAccumulator(f"{folder}/tensorboard").Reload()
    whole = plugin_event_accumulator.EventAccumulator(f"{folder}/tensorboard").Reload()
    scalars = [(event.step, round(event.value, 2)) for event in plain.Scalars("lm loss")]
    again = [(e.step, round(float(tensor_util.make_ndarray(e.tensor_proto)), 2)) for e in whole.Tensors("lm loss")]
    texts = [
        (event.step, tensor_util.make_ndarray(event.tensor_proto)[0].decode())
        for event in whole.Tensors("validation/0/text_summary")
    ]
    images = [event.step for event in plain.Images("validation/0")]
    assert scalars == again and images == [step for step, _ in texts]
    assert images == [event.step for event in whole.Tensors("validation/0")]
    return scalars, texts


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a minute pass between starts, because TensorBoard orders a folder's files by their start in seconds."""
    begin, real, passed = Writer.begin, time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + passed[0])

    def later(self: Writer, step: int) -> None:
        passed[0] += 60
        begin(self, step)

    monkeypatch.setattr(Writer, "begin", later)


def test_prometheus_gets_the_latest_values(tmp_path: Path) -> None:
    save, file = tmp_path / "run", tmp_path / "metrics" / "genlip.prom"
    writer = begun(save, 0, log__prometheus_file=str(file))
    writer.scalars({"lm loss": 2.5, "data-wait": 0.125}, 10)
    (save / "latest_checkpointed_iteration.txt").write_text("10")
    writer.scalars({"lm loss": float("nan")}, 20)
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    values = {re.sub(r'\{save="(.*)"\}', "", name): value for name, value in (line.split() for line in lines)}
    assert all(f'{{save="{save}"}}' in line for line in lines)
    assert values["genlip_lm_loss"] == "NaN" and values["genlip_data_wait"] == "0.125"
    assert values["genlip_iteration"] == "20.0"
    for event in ("report", "checkpoint"):
        assert abs(time.time() - float(values[f"genlip_last_{event}_timestamp_seconds"])) < 60
    assert sorted(path.name for path in file.parent.iterdir()) == ["genlip.prom"]


def test_a_prometheus_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^log.prometheus_file = .*/file/genlip.prom: .*Choose a file"):
        begun(tmp_path, 0, log__prometheus_file=str(tmp_path / "file" / "genlip.prom"))


def test_steps_after_a_crash_are_shown_once(apart: None, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log(begun(folder, 0), 0, *range(32))
    log(begun(folder, 20), 20, *range(21, 32))
    scalars, texts = shown(folder)
    first = [(step, float(step)) for step in range(21)]
    assert scalars == first + [(step, step + 0.2) for step in range(21, 32)]
    assert texts == [(0, "0 after 0"), (10, "10 after 0"), (20, "20 after 0"), (30, "30 after 20")]
    # At the last step no step is repeated. In a copied folder the original log does not change.
    begun(folder, 31)
    assert shown(folder) == (scalars, texts)
    shutil.copytree(folder, tmp_path / "copy")
    log(begun(tmp_path / "copy", 20), 20, 21)
    assert shown(tmp_path / "copy") == (first + [(21, 21.2)], texts[:3])
    assert shown(folder) == (scalars, texts)
    # Without a checkpoint all steps are repeated, including the validation before the first step.
    log(begun(folder, 0), 50, 0, 1)
    assert shown(folder) == ([(0, 0.5), (1, 1.5)], [(0, "0 after 50")])


def test_a_log_of_an_earlier_version_is_continued(apart: None, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = begun(tmp_path / "other", 0)
    writer._board = SummaryWriter(f"{tmp_path}/tensorboard")  # without a start event
    log(writer, 0, *range(12))
    log(begun(tmp_path, 5), 5, *range(6, 8))
    scalars, texts = shown(tmp_path)
    assert [step for step, _ in scalars] == list(range(8)) and texts == [(0, "0 after 0")]


def test_validating_an_old_checkpoint_hides_nothing(apart: None, tmp_path: Path) -> None:
    log(begun(tmp_path, 0), 0, *range(12))
    writer = begun(tmp_path, 5, log__eval_only=True, log__tensorboard_dir=f"{tmp_path}/tensorboard")
    writer.scalars({"lm loss validation": 1.0}, 5)
    assert [step for step, _ in shown(tmp_path)[0]] == list(range(12))


def test_steps_of_a_real_run_are_shown_once(demo_data: Path, tmp_path: Path) -> None:
    """The run rolls back from step 4 to 2, and crashes after step 7 with a checkpoint of step 6."""
    flags = {"faults__on_spike": "rollback", "checkpoint__save_interval": 2, "log__log_interval": 1}
    folder = tmp_path / "run"
    for last, faults in ((7, ["spike@4:0"]), (9, [])):
        _, config = settings(demo_data, "DP2", *faults, **flags, checkpoint__save=str(folder), train__train_iters=last)
        ((status, _),) = run_distributed(1, trained, config)
        assert status == 0
        shutil.rmtree(folder / f"iter_{7:07d}", ignore_errors=True)
    events = plugin_event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Tensors("lm loss")] == list(range(1, 10))
    assert [event.step for event in events.Tensors("lm loss validation")] == [0, 9]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_full_disk_costs_values_but_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a real file system without space; what comes after some is freed is written again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {made.stderr.strip()}")
    try:
        writer = begun(disk / "run", 0)
        writer.scalars({"lm loss": 1.0}, 1)
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))
        for step in range(2, 400):
            writer.scalars({f"value {i}": 1.0 for i in range(20)}, step)
        writer.caption(0, torch.zeros(3, 64, 64, dtype=torch.uint8), "text", 400)
        said = capsys.readouterr().out.splitlines()
        assert 0 < len(said) < 5 and all(line.endswith("lacks these values; training continues") for line in said)
        (disk / "ballast").unlink()
        writer.scalars({"lm loss": 3.0}, 401)
        writer.close()
        events = event_accumulator.EventAccumulator(f"{disk}/run/tensorboard").Reload()
        assert [(event.step, event.value) for event in events.Scalars("lm loss")] == [(1, 1.0), (401, 3.0)]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def history(folder: Path) -> list[tuple[str, str, list[int]]]:
    """(run id, project, steps that were logged) of each of W&B's offline files, in the order of their starts.

    A file is 7 bytes, then blocks of 32 KiB with records: checksum, length, type (1 whole; 2, 3, 4: parts), content.
    """
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    found = []
    for file in sorted(folder.rglob("*.wandb"), key=lambda path: path.parent.name):
        content, place, parts = file.read_bytes(), 7, b""
        name, project, steps, internal = "", "", [], []
        while place + 7 <= len(content):
            if (room := 32768 - place % 32768) < 7:
                place += room
                continue
            size, kind = struct.unpack_from("<HB", content, place + 4)
            parts += content[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):
                record = messages.Record.FromString(parts)
                parts = b""
                if record.HasField("run"):
                    name, project = record.run.run_id, record.run.project
                elif record.HasField("history"):
                    values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                    steps.append(int(values["iteration"]))
                    internal.append(record.history.step.num)
        assert internal == sorted(set(internal))  # W&B drops steps that do not increase
        found.append((name, project, steps))
    return found


@pytest.fixture
def wandb_env(tmp_path: Path) -> dict[str, str]:
    """The environment of W&B without a login and without a network."""
    (tmp_path / "wandb").mkdir()
    names = ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME")
    return {**dict.fromkeys(names, f"{tmp_path}/wandb"), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def launch(zygote: Zygote, config: RunConfig, folder: Path, env: dict[str, str], ranks: int = 1) -> list[Ended]:
    (folder / "config.yaml").write_text(config.to_yaml())
    return zygote.run(ranks, ["--config", str(folder / "config.yaml")], env)


def log_to_wandb() -> int:
    """Log a step from a new process: (folder, project, step)."""
    folder, project, step = sys.argv[1:]
    config = override(RunConfig(), {"checkpoint.save": folder, "log.wandb_project": project})
    writer = Writer(config, active=True)
    writer.begin(int(step) - 1)
    writer.scalars({"lm loss": 1.0}, int(step))
    writer.close()
    return 0


@pytest.mark.slow
@needs_wandb
def test_wandb_continues_the_same_run(
    zygote: Zygote, demo_data: Path, tmp_path: Path, wandb_env: dict[str, str]
) -> None:
    """Repeated steps, after a rollback from step 4 to 2 and a crash after 5, are logged again."""
    folder = tmp_path / "run"
    flags = {"faults__on_spike": "rollback", "checkpoint__save_interval": 2, "log__log_interval": 1}
    flags |= {"checkpoint__save": str(folder), "log__wandb_project": "genlip", "data__valid_data": ""}
    for last, faults in ((5, ["spike@4:0"]), (6, [])):
        _, config = settings(demo_data, "DP2", *faults, **flags, train__train_iters=last)
        (ended,) = launch(zygote, config, tmp_path, wandb_env)
        assert ended.code == 0, ended.output[-3000:]
        shutil.rmtree(folder / "iter_0000005", ignore_errors=True)
        time.sleep(1.1)  # W&B names its folders by the second
    first, second = history(tmp_path / "wandb")
    assert first[1:] == ("genlip", [1, 2, 3, 3, 4, 5]) and second == (first[0], "genlip", [5, 6])


@pytest.mark.slow
@needs_wandb
def test_a_copied_folder_or_another_project_is_another_wandb_run(
    zygote: Zygote, tmp_path: Path, wandb_env: dict[str, str]
) -> None:
    def logged(folder: Path, project: str, step: int) -> str:
        (ended,) = zygote.run(1, [str(folder), project, str(step)], wandb_env, target=f"{__name__}:log_to_wandb")
        assert ended.code == 0, ended.output[-3000:]
        time.sleep(1.1)
        name, *rest = history(tmp_path / "wandb")[-1]
        assert rest == [project, [step]]
        return name

    folder, copy = tmp_path / "run", tmp_path / "copy"
    name = logged(folder, "genlip", 1)
    shutil.copytree(folder, copy)
    assert logged(copy, "genlip", 2) != name, "two runs must not write to one"
    assert logged(folder, "genlip", 2) == name
    assert logged(folder, "other", 3) != name
    (copy / WANDB_FILE).write_text("{")  # cut off by a crash
    assert logged(copy, "genlip", 3) != name


@pytest.mark.slow
@needs_wandb
@pytest.mark.parametrize(
    ("env", "flags", "message"),
    [
        ({"WANDB_MODE": "online"}, {}, "No API key configured"),
        pytest.param(
            {"WANDB_MODE": "online", "WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"},
            {},
            "Failed to authenticate with http://127.0.0.1:9",
            marks=pytest.mark.long,  # it tries for ten seconds
        ),
        ({}, {"log__wandb_project": "my/project"}, "Invalid project name 'my/project'"),
    ],
)
def test_wandb_that_does_not_start_is_a_user_error_on_all_ranks(
    env: dict[str, str],
    flags: dict[str, Any],
    message: str,
    zygote: Zygote,
    demo_data: Path,
    tmp_path: Path,
    wandb_env: dict[str, str],
) -> None:
    config = tiny_config(demo_data, **{"log__wandb_project": "genlip", **flags})
    ended = launch(zygote, config, tmp_path, {**wandb_env, **env}, 2)
    assert [one.code for one in ended] == [EXIT_USER_ERROR] * 2, ended[0].output[-3000:]
    text = "".join(one.output for one in ended)
    (line,) = [line for line in text.splitlines() if line.startswith("pretrain_genlip.py: error:")]
    assert f"log.wandb_project = {config.log.wandb_project}: Weights & Biases does not start: {message}" in line
    assert line.endswith("Run wandb login, set WANDB_MODE=offline, or remove the setting")
    assert "Traceback" not in text and "parameters " not in text  # no model was built


def test_wandb_that_is_not_installed_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r"log.wandb_project = genlip: wandb is not installed\. Run pip install '\.\[wandb\]' in the checkout",
    ):
        Writer(override(RunConfig(), {"log.wandb_project": "genlip"}), active=True)


@pytest.mark.parametrize("setting", ["log__tensorboard_dir", "checkpoint__save"])
def test_a_log_that_cannot_be_written_is_a_user_error_on_all_ranks(
    setting: str, demo_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    config = tiny_config(demo_data, **{setting: str(tmp_path / "file" / "log")})
    for message in run_distributed(2, failing_set_up, config):
        assert message.startswith(f"{setting.replace('__', '.')} = {tmp_path}/file/log: ")
        assert "Not a directory" in message and message.endswith(". Choose a folder that can be written to")
