"""On a really full disk a run loses checkpoints, but continues."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from genlip_megatron.checkpoint import loading
from genlip_megatron.checkpoint import paths as checkpoints
from genlip_megatron.faults.exits import EXIT_NOT_SAVED
from genlip_megatron.testing.processes import Zygote
from tests.fault_table import FaultRow
from tests.reliability.training import Training

pytestmark = pytest.mark.faults


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("freed", "outcome"),
    [
        (True, "save fails with a warning, training continues, next save succeeds"),
        (False, f"status {EXIT_NOT_SAVED}, old checkpoint kept"),
    ],
)
def test_a_full_disk(
    freed: bool,
    outcome: str,
    zygote: Zygote,
    demo_data: Path,
    tmp_path: Path,
    small_disk: Path,
    fault_row: FaultRow,
) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    flags = {"checkpoint__save": str(run), "checkpoint__keep_last": 1, "train__train_iters": 60}
    training = Training(zygote, demo_data, tmp_path / "training", 2, flags)
    job = training.start("--no-async-save")
    job.wait_for("saved ")
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    job.wait_for("No space left on device")
    if freed:
        ballast.unlink()
    ended = job.wait(end_others=0.5)
    assert [one.code for one in ended] == [0 if freed else EXIT_NOT_SAVED] * 2, ended[0].output[-2000:]
    assert (checkpoints.steps(run) == [60]) == freed
    assert loading.find(run, True, print) is not None
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    fault_row("full disk", f"tmpfs, 2 ranks, {'freed later' if freed else 'to the end'}", outcome)
