"""On a really full disk a run loses checkpoints, but continues."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from genlip_megatron.checkpoint import paths as checkpoints
from genlip_megatron.checkpoint.saving import bytes_of
from genlip_megatron.faults.exits import EXIT_NOT_SAVED
from genlip_megatron.testing.processes import Zygote
from genlip_megatron.testing.runs import tiny_config
from tests.fault_table import FaultRow
from tests.reliability.training import Training

pytestmark = pytest.mark.faults

FULL = "No space left on device"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 16 MiB: enough for the kept checkpoints and one more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, training: Training, output: str) -> Path:
    """A file that leaves room for the estimate at the start, but not for a whole checkpoint.

    The estimate counts only the tensors; a small model's checkpoint is much larger.
    """
    found = re.search(r"parameters (\d+)", output)
    assert found is not None
    room = bytes_of(tiny_config(training.data), int(found.group(1))) + 2**16
    size = sum(file.stat().st_size for file in checkpoints.step_folder(disk / "run", 2).rglob("*") if file.is_file())
    assert room < size - 2**16
    ballast = disk / "ballast"
    usage = subprocess.run(["df", "--output=avail", "-B1", str(disk)], capture_output=True, text=True, check=True)
    ballast.write_bytes(bytes(max(0, int(usage.stdout.split()[-1]) - room)))
    return ballast


def started(zygote: Zygote, data: Path, folder: Path, disk: Path) -> tuple[Training, str]:
    """(two ranks' run on the small disk with a checkpoint of step 2, its output)."""
    flags = {"checkpoint__save": str(disk / "run"), "train__train_iters": 24}
    training = Training(zygote, data, folder, 2, flags)
    first, second = training.go("--exit-interval", "2")
    assert (first.code, second.code) == (0, 0), first.output
    return training, first.output


@pytest.mark.slow
def test_the_next_save_succeeds_when_there_is_space_again(
    zygote: Zygote, demo_data: Path, tmp_path: Path, small_disk: Path, fault_row: FaultRow
) -> None:
    training, output = started(zygote, demo_data, tmp_path / "training", small_disk)
    ballast = fill(small_disk, training, output)
    job = training.start("--no-async-save")
    job.wait_for(FULL)
    ballast.unlink()
    ended = job.wait(end_others=0.5)
    assert [one.code for one in ended] == [0, 0], ended[0].output[-2000:]
    assert checkpoints.steps(small_disk / "run")[0] == 24
    assert not [path.name for path in (small_disk / "run").iterdir() if path.name.startswith(".")]
    fault_row(
        "full disk", "tmpfs, 2 ranks, freed later", "save fails with a warning, training continues, next save succeeds"
    )


@pytest.mark.slow
def test_a_run_whose_last_save_fails_reports_it_and_keeps_the_old_checkpoint(
    zygote: Zygote, demo_data: Path, tmp_path: Path, small_disk: Path, fault_row: FaultRow
) -> None:
    training, output = started(zygote, demo_data, tmp_path / "training", small_disk)
    fill(small_disk, training, output)
    ended = training.go()
    assert [one.code for one in ended] == [EXIT_NOT_SAVED] * 2, ended[0].output[-2000:]
    assert FULL in ended[0].output
    assert checkpoints.steps(small_disk / "run") == [2]
    assert sorted(path.name for path in (small_disk / "run").iterdir() if path.name.startswith((".", "iter_"))) == [
        "iter_0000002"
    ]
    fault_row("full disk", "tmpfs, 2 ranks, to the end", f"status {EXIT_NOT_SAVED}, old checkpoint kept")
