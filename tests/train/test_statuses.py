"""Exit statuses: a user error is one line, printed once; an unexpected error is a crash."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from genlip_megatron.faults import exits
from genlip_megatron.testing.processes import Zygote
from genlip_megatron.train import loop, setup, validation
from tests.fault_table import FaultRow
from tests.reliability.training import Training

pytestmark = pytest.mark.faults

UNDER_TORCHRUN = {"TORCHELASTIC_RUN_ID": "launch"}


def failing_in_set_up() -> int:
    """Training whose set-up fails with a user error on every rank; two of three ranks have the same error."""

    def build_run(config: object) -> None:
        raise ValueError("the disk of this node" if os.environ["RANK"] == "1" else "the same for all")

    setup.build_run = build_run  # type: ignore[assignment]
    return _main()


def failing() -> int:
    """Training whose first step raises a ValueError that is not a user error."""

    def train_step(*_: object) -> None:
        json.loads("{")

    loop.train_step = train_step  # type: ignore[assignment]
    return _main()


def _main() -> int:
    import pretrain_genlip

    return pretrain_genlip.main()


@pytest.mark.slow
def test_a_user_error_is_printed_once_by_a_rank_that_found_it(zygote: Zygote, demo_data: Path, tmp_path: Path) -> None:
    training = Training(zygote, demo_data, tmp_path, 3, {"train__global_batch_size": 3})
    ended = training.start(env=UNDER_TORCHRUN, target=f"{__name__}:failing_in_set_up").wait()
    assert [one.code for one in ended] == [exits.EXIT_USER_ERROR] * 3, ended[0].output[-2000:]
    assert "error: the disk of this node" in ended[1].output
    lines = [line for one in ended for line in one.output.splitlines() if "error: the same for all" in line]
    assert len([line for line in lines if not line.startswith("ended: ")]) == 1  # the last line says it once more
    assert (training.run / exits.FINAL_EXIT).exists()


def test_a_value_error_of_training_is_a_crash(zygote: Zygote, demo_data: Path, tmp_path: Path) -> None:
    training = Training(zygote, demo_data, tmp_path)
    (ended,) = training.start(env=UNDER_TORCHRUN, target=f"{__name__}:failing").wait()
    assert ended.code == 1 and "Traceback" in ended.output and "JSONDecodeError" in ended.output
    assert not (training.run / exits.FINAL_EXIT).exists()


@pytest.mark.faults
@pytest.mark.parametrize(("saves", "status"), [("checkpoint__save", exits.EXIT_NOT_SAVED), ("", exits.EXIT_PREEMPTED)])
def test_a_run_that_stopped_on_request_without_a_save_is_not_restarted(
    saves: str, status: int, zygote: Zygote, demo_data: Path, tmp_path: Path, fault_row: FaultRow
) -> None:
    """A stop is requested on a full disk, or without a folder; then torchrun restarts the worker."""
    training = Training(zygote, demo_data, tmp_path)
    flags = {} if saves else {"checkpoint__save": ""}
    drill = ("--allow-fault-injection", "--inject-fault", "usr1@3:0,full-disk@3:0" if saves else "usr1@3:0")
    (ended,) = training.start(*drill, env=UNDER_TORCHRUN, **flags).wait()
    assert ended.code == status, ended.output[-2000:]
    assert ("NOT SAVED" in ended.output) == bool(saves)
    assert ("leaving after step 3; nothing is saved" in ended.output) != bool(saves)
    (again,) = training.start(env=UNDER_TORCHRUN, **flags).wait()
    exits.mark_of("" if not saves else training.run, zygote.pid).unlink()
    assert again.code == status and f"this launch ended with status {status}" in again.output
    fault_row("SIGUSR1", "disk full at the last save" if saves else "without --save", f"status {status}, not restarted")


def validating() -> int:
    """A validation that gets a stop signal while it runs."""

    def evaluate(*_: object) -> dict[str, tuple[float, float]]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return {"val": (0.0, 1.0)}

    validation.evaluate_sets = evaluate  # type: ignore[assignment]
    return _main()


def test_eval_only_ends_at_the_first_signal(zygote: Zygote, demo_data: Path, tmp_path: Path) -> None:
    training = Training(zygote, demo_data, tmp_path)
    assert training.go("--exit-interval", "2")[0].code == 0
    flags = ("--eval-only", "--load", str(training.run), "--valid-data", f"{demo_data}/val-*.tar")
    (ended,) = training.start(*flags, target=f"{__name__}:validating").wait()
    assert ended.code == exits.EXIT_PREEMPTED and "validation loss" not in ended.output


def copied(demo_data: Path, folder: Path) -> Path:
    """A copy of the demo's data to damage; the manifest's paths are relative."""
    return Path(shutil.copytree(demo_data, folder / "data", copy_function=shutil.copy2))


@pytest.mark.parametrize("kind", ["missing", "short", "no index"])
def test_missing_shards_are_a_user_error_printed_once(
    kind: str, zygote: Zygote, demo_data: Path, tmp_path: Path
) -> None:
    data = copied(demo_data, tmp_path)
    shard = data / "train-00000.tar"
    if kind == "short":
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        (shard if kind == "missing" else Path(f"{shard}.index.safetensors")).unlink()
    flags = {"data__train_data": [str(data / "train.dataset.json")], "train__global_batch_size": 2}
    ended = Training(zygote, data, tmp_path, 2, flags).start(env=UNDER_TORCHRUN).wait()
    assert [one.code for one in ended] == [exits.EXIT_USER_ERROR] * 2, ended[0].output[-2000:]
    # Printed twice if rank 0, which holds the store, has ended before the other asks.
    assert sum(one.output.count("shards cannot be used") for one in ended) in (1, 2)
    assert not (tmp_path / "history" / "rank0.jsonl").exists()


@pytest.mark.slow
def test_too_large_a_share_of_bad_samples_ends_all_ranks_also_after_a_resume(
    zygote: Zygote, demo_data: Path, tmp_path: Path
) -> None:
    """A shard of the same size has other bytes; half of the samples are bad, but never many in a row."""
    data = copied(demo_data, tmp_path)
    flags = {"data__train_data": [str(data / "train.dataset.json")], "train__global_batch_size": 2}
    training = Training(zygote, data, tmp_path, 2, flags)
    assert [one.code for one in training.start("--exit-interval", "2").wait()] == [0, 0]
    shard = data / "train-00000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    words = ("--train-iters", "40", "--max-consecutive-failures", "0")
    for _ in range(2):
        ended = training.start(*words, env=UNDER_TORCHRUN).wait()
        assert [one.code for one in ended] == [exits.EXIT_DATA_FAILURE] * 2, ended[0].output[-2000:]
        assert sum(one.output.count("data.max_bad_share = 0.01 allows") for one in ended) in (1, 2)
        (training.run / exits.FINAL_EXIT).unlink()
    ended = training.start(*words, "--max-bad-share", "1").wait()
    assert [one.code for one in ended] == [0, 0], ended[0].output[-2000:]
