"""The launch examples are valid commands, their headings name the requirements, and SLURM jobs requeue themselves as
long as it helps.

The SLURM examples run as real bash processes with fake srun, scontrol and torchrun.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from genlip_megatron.config.checks import check
from genlip_megatron.config.command_line import parse_args
from tests.fault_table import FaultRow

FOLDER = Path(__file__).parent.parent.parent / "examples"
LAUNCHES = [path for path in FOLDER.iterdir() if path.suffix in (".sh", ".sbatch")]
EXAMPLES = sorted(path for path in LAUNCHES if path.name != "slurm_run.sh")  # sourced by the others
GPUS = {"single_gpu.sh": 1, "one_node.sh": 8, "multi_node.sh": 64, "slurm_stage1.sbatch": 64, "slurm_stage2.sbatch": 32}


def entry_flags(example: Path) -> list[str]:
    """The arguments of ``pretrain_genlip.py`` in the example, with variables replaced by names."""
    text = example.read_text().replace("\\\n", " ")
    launch = next(line for line in text.splitlines() if "pretrain_genlip.py --config" in line)
    words = shlex.split(launch.split("pretrain_genlip.py", 1)[1].replace('"$@"', "").rstrip("& "))
    return [re.sub(r"\$\w+", "name", word) for word in words]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_command_line_accepts_the_example_on_its_gpus(example: Path) -> None:
    config, _ = parse_args(entry_flags(example))
    check(config, world_size=GPUS[example.name])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_heading_names_command_gpus_and_hours(example: Path) -> None:
    heading = example.read_text().split("\nset -", 1)[0]
    assert f"examples/{example.name}" in heading
    assert "GPUs:" in heading and "Hours" in heading
    subprocess.run(["bash", "-n", str(example)], check=True)


def test_an_unknown_flag_in_an_example_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args([*entry_flags(EXAMPLES[0]), "--overlap-grad-reduction"])
    assert "Did you mean '--overlap-grad-reduce'?" in capsys.readouterr().err


STAND_INS = {
    # Ignores options, records signals for the training, and runs the launched command.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        [[ $1 == pkill ]] && { echo "$@" >>told; exit; }
        exec "$@"
    """,
    "scontrol": """
        [[ $1 == show ]] && { echo node01; echo node02; exit; }
        echo "$@" >>requeues
    """,
    # The training: the test's script, with the save folder in $save.
    "torchrun": """
        echo "$@" >>launches
        while [[ $1 != --save ]]; do
            [[ $1 == --rdzv-id ]] && launch=$2
            shift
        done
        save=$2
        mkdir -p "$save"
        saved() { printf '%s' "$1" >"$save/latest_checkpointed_iteration.txt"; }
        source ./training
    """,
}
TOLD = "until [ -e told ]; do sleep 0.05; done; sleep 0.3"


class Slurm:
    """Runs an example repeatedly, as SLURM would, until it is not requeued."""

    def __init__(self, folder: Path, example: str) -> None:
        self.folder, self.example, self.starts = folder, example, 0
        self.save = folder / "run" / example.removeprefix("slurm_").removesuffix(".sbatch")
        (folder / "bin").mkdir()
        for name, text in STAND_INS.items():
            file = folder / "bin" / name
            file.write_text(f"#!/usr/bin/env bash\n{text}")
            file.chmod(0o755)
        # The script runs in the folder of the sbatch call, which links to the repository's files.
        (folder / "examples").symlink_to(FOLDER)

    def start(self, training: str, job: str = "7", preempted: bool = False) -> subprocess.CompletedProcess[str]:
        """Run the script once with this training; ``preempted``: SLURM signals it after the training has started."""
        (self.folder / "training").write_text(training)
        for name in ("told", "requeues"):
            (self.folder / name).unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "RUN": "run",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": job,
            "SLURM_RESTART_COUNT": str(self.starts),
            "SLURM_JOB_NODELIST": "node[01-02]",
            "SLURM_JOB_NUM_NODES": "2",
            **{name: "x" for name in ("TOKENIZER", "TRAIN_DATA", "VALID_DATA")},
        }
        self.starts += 1
        before = len(self.launches)
        script = subprocess.Popen(
            ["bash", str(FOLDER / self.example)],
            cwd="/",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            end = time.monotonic() + 20
            while preempted and len(self.launches) == before and time.monotonic() < end:
                time.sleep(0.02)
            if preempted:
                script.send_signal(signal.SIGUSR1)
            output, errors = script.communicate(timeout=20)
        finally:
            script.kill()
        return subprocess.CompletedProcess(script.args, script.returncode, output, errors)

    @property
    def launches(self) -> list[str]:
        file = self.folder / "launches"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeues").exists()


@pytest.fixture(params=["slurm_stage1.sbatch", "slurm_stage2.sbatch"])
def slurm(request: pytest.FixtureRequest, tmp_path: Path) -> Slurm:
    return Slurm(tmp_path, request.param)


def test_finished_job_is_not_requeued(slurm: Slurm) -> None:
    done = slurm.start("saved 10")
    assert done.returncode == 0 and not slurm.requeued and "done, at step 10" in done.stdout
    assert "--nnodes 2 " in slurm.launches[0] and "--rdzv-endpoint node01:29500" in slurm.launches[0]


@pytest.mark.faults
def test_preempted_job_waits_for_the_save_and_is_requeued(slurm: Slurm, fault_row: FaultRow) -> None:
    done = slurm.start(f"{TOLD}; saved 10; exit 1", preempted=True)
    assert (slurm.folder / "told").read_text().startswith("pkill -USR1 -f")
    assert done.returncode == 1 and slurm.requeued
    assert "requeued at step 10 (step 0 at the start" in done.stdout
    fault_row("SLURM time limit", slurm.example, "saved, requeued")


def test_a_job_that_finishes_during_preemption_is_not_requeued(slurm: Slurm) -> None:
    done = slurm.start(f"{TOLD}; saved 10", preempted=True)
    assert done.returncode == 0 and not slurm.requeued


def test_failure_after_a_newer_checkpoint_is_requeued_each_time(slurm: Slurm) -> None:
    for step in (8, 10, 100, 1000):
        assert slurm.start(f"saved {step}; exit 1").returncode == 1 and slurm.requeued


def test_third_failure_in_a_row_without_progress_ends_the_job(slurm: Slurm) -> None:
    slurm.start("saved 10; exit 1")
    for _ in range(2):
        slurm.start("exit 1")
        assert slurm.requeued
    done = slurm.start("saved 10; exit 1")
    assert done.returncode == 1 and not slurm.requeued
    assert "not requeued: 3 starts in a row" in done.stderr and "newer than step 10" in done.stderr
    # A job submitted again after the fix has all its tries.
    slurm.start("exit 1", job="8")
    assert slurm.requeued


def test_progress_resets_the_count_of_failures(slurm: Slurm) -> None:
    for training in ("exit 1", "exit 1", "saved 5; exit 1", "exit 1", "exit 1"):
        slurm.start(training)
        assert slurm.requeued
    slurm.start("exit 1")
    assert not slurm.requeued


@pytest.mark.faults
def test_failures_of_nodes_are_counted_too(slurm: Slurm, fault_row: FaultRow) -> None:
    """Such a failure kills the script, and SLURM itself requeues the job."""
    for training in ("saved 5", "true", "true", "true"):
        slurm.start(f"{training}; kill -9 $PPID")
    done = slurm.start("saved 10")
    assert done.returncode == 1 and len(slurm.launches) == 4
    assert "not requeued: 3 starts in a row" in done.stderr and "newer than step 5" in done.stderr
    fault_row("SLURM node failure", slurm.example, "requeued, at most 3 times in a row without progress")


@pytest.mark.parametrize("status", [2, 18, 19])
def test_a_final_failure_is_not_requeued(status: int, slurm: Slurm) -> None:
    done = slurm.start(f'saved 5; echo "{status} $launch" >"$save/final_exit"; exit 1')
    assert done.returncode == 1 and not slurm.requeued and f"left with status {status}" in done.stderr
    slurm.start("saved 6; exit 1")  # the file of an earlier start does not count
    assert slurm.requeued


def test_a_preempted_job_that_could_not_save_is_requeued(slurm: Slurm) -> None:
    slurm.start('saved 5; echo "22 $launch" >"$save/final_exit"; exit 1')
    assert slurm.requeued


def test_stop_file_ends_the_job(slurm: Slurm) -> None:
    done = slurm.start('saved 5; touch "$save/stop"; exit 1')
    assert done.returncode == 1 and not slurm.requeued and "/stop ended it" in done.stderr
    done = slurm.start('mv "$save/stop" "$save/stop.obeyed"; saved 6; exit 1')
    assert not slurm.requeued and "/stop ended it" in done.stderr
    slurm.start("saved 7; exit 1")  # submitted again
    assert slurm.requeued and not (slurm.save / "stop.obeyed").exists()


@pytest.mark.parametrize("text", ["", "release", "0010 and more\nother lines"])
def test_a_damaged_pointer_to_the_newest_checkpoint(text: str, slurm: Slurm) -> None:
    done = slurm.start(f"saved {shlex.quote(text)}; exit 1")
    assert done.stderr == ""
    assert f"{0 if text.startswith('00') else 1} starts without progress" in done.stdout


def test_each_start_of_a_job_has_its_own_launch_id(slurm: Slurm) -> None:
    slurm.start("saved 1; exit 1")
    slurm.start("saved 2; exit 1")
    assert [re.findall(r"--rdzv-id (\S+)", launch) for launch in slurm.launches] == [["7.0"], ["7.1"]]
