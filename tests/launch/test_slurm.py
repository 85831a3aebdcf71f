"""The SLURM examples on a real SLURM of two nodes.

The first tests run the real training. In the others a bash snippet stands for torchrun, because they are about what
SLURM and ``examples/slurm_run.sh`` do when the training ends in some way.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genlip_megatron.testing import CHECKOUT
from tests.fault_table import FaultRow
from tests.launch.lab import Lab, wait_for

pytestmark = pytest.mark.slow
VENV = Path(sys.executable).parent
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# A job for a part of a node, so that several run at the same time.
SMALL = ("--nodes=1", "--gpus-per-node=1", "--exclusive=user", "--mem=100", "--cpus-per-task=1")
STAND_INS = {
    # Runs the test's snippet. It may call ``saved STEP``, and knows its ``$save`` folder and ``$launch`` id.
    "torchrun": """
        save=$RUN/stage1
        echo "$@" >>"$RUN/launches"
        saved() { printf '%s' "$1" >"$save/latest_checkpointed_iteration.txt"; }
        until_told() { told=; trap 'told=1' USR1; touch "$RUN/waits"; until [ "$told" ]; do sleep 0.1; done; }
        while [[ $1 != --rdzv-id ]]; do shift; done
        launch=$2
        eval "$TRAINING"
    """,
    # Checks and snapshots take seconds with the real one.
    "python": "[[ $1 = -c && -e $RUN/old_torch ]] && exit 1; exit 0",
}


class Cluster:
    """Submits the examples, and reads what became of a job."""

    def __init__(self, lab: Lab, checkout: Path, folder: Path) -> None:
        self.lab, self.checkout, self.folder = lab, checkout, folder
        self.stand_ins = folder / "bin"
        self.stand_ins.mkdir()
        for name, text in STAND_INS.items():
            (self.stand_ins / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (self.stand_ins / name).chmod(0o755)

    def submit(
        self,
        run: str,
        *flags: str,
        training: str = "",
        options: tuple[str, ...] = SMALL,
        stage: int = 1,
        data: Path | None = None,
    ) -> str:
        """Submit an example; returns the job's number.

        Args:
            run: name of the run's folder.
            flags: of the training.
            training: snippet that stands for torchrun; empty: the real training, on ``data``.
            options: of sbatch.
        """
        (self.folder / run).mkdir(exist_ok=True)
        environment = self.environment(self.folder / run, training, data or self.folder)
        script = f"examples/slurm_stage{stage}.sbatch"
        return self.lab.on("sbatch", "--parsable", *options, script, *flags, cwd=self.checkout, **environment)

    def environment(self, run: Path, training: str, data: Path) -> dict[str, str]:
        """What the examples read from the environment."""
        return {
            "PATH": ":".join([*([str(self.stand_ins)] if training else []), str(VENV), self.lab.environment["PATH"]]),
            "RUN": str(run),
            "TRAINING": training,
            "TOKENIZER": str(data / "tokenizer.model"),
            "TRAIN_DATA": f"{data}/train-*.tar",
            "VALID_DATA": f"{data}/val-*.tar",
            "GPUS_PER_NODE": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60",
        }

    def waits(self, run: str) -> None:
        """Wait until the snippet of a run waits in ``until_told``."""
        wait_for(f"{run} waits", (self.folder / run / "waits").exists)

    def logs(self, run: str, job: str) -> Path:
        return self.folder / run / "stage1" / "logs" / job

    def starts(self, run: str, job: str) -> list[str]:
        """The line of each start of a job."""
        file = self.logs(run, job) / "starts.log"
        return file.read_text().splitlines() if file.exists() else []

    def ended(self, job: str, seconds: float = 90) -> tuple[str, int]:
        """(state, number of requeues) of a job, when it has ended."""
        return self.lab.wait_for_state(job, *ENDED, seconds=seconds), int(self.lab.field(job, "Restarts"))


@pytest.fixture(scope="module")
def slurm(lab: Lab, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(lab, checkout, tmp_path_factory.mktemp("slurm"))
    yield cluster
    assert not list(checkout.glob("*.log")), "the folder of the sbatch call stays clean"


# What the training does, by start -> (state, requeues, text of the last start's line).
ENDS = {
    "saved 10": ("COMPLETED", 0, "steps 0 to 10 | done"),
    'saved 5; echo "2 $launch 1" >"$save/final_exit"; exit 1': ("FAILED", 0, "left with status 2"),
    'saved 5; echo "18 $launch 1" >"$save/final_exit"; exit 1': ("FAILED", 0, "left with status 18"),
    'saved 5; echo "19 $launch 1" >"$save/final_exit"; exit 1': ("FAILED", 0, "left with status 19"),
    'saved 5; touch "$save/stop"; exit 1': ("FAILED", 0, "/stop ended it"),
    'saved 5; touch "$save/stop.obeyed"; exit 1': ("FAILED", 0, "/stop ended it"),
    "exit 1": ("FAILED", 2, "3 starts in a row ended with an error before a checkpoint newer than step 0"),
    # An earlier start's mark does not count, nor does a save that failed when the job was preempted.
    '[ $SLURM_RESTART_COUNT ] && exit 0; echo "22 $launch 1" >"$save/final_exit"; exit 1': ("COMPLETED", 1, "done"),
    'case ${SLURM_RESTART_COUNT:-0} in 1) saved 5 ;; 4) exit 0 ;; esac; exit 1': ("COMPLETED", 4, "5 to 5 | done"),
    # A damaged pointer to the newest checkpoint.
    '[ $SLURM_RESTART_COUNT ] && exit 0; saved "release"; exit 1': ("COMPLETED", 1, "steps 0 to 0 | done"),
    '[ $SLURM_RESTART_COUNT ] && exit 0; saved "0010 more\nlines"; exit 1': ("COMPLETED", 1, "steps 10 to 10 | done"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ends(slurm: Cluster) -> dict[str, tuple[str, str]]:
    """The run and job of each of ENDS; all run at the same time."""
    jobs = {}
    for i, training in enumerate(ENDS):
        # Failures of an earlier job do not count.
        save = slurm.folder / f"end{i}" / "stage1"
        save.mkdir(parents=True)
        (save / "requeues_without_progress").write_text("999999 3 0")
        jobs[training] = f"end{i}", slurm.submit(f"end{i}", training=training)
    return jobs


def steps_of(output: Path) -> list[int]:
    """The steps in the log of a node's rank 0."""
    return [int(step) for step in re.findall(r"^\[0\] iteration +(\d+)/", output.read_text(), re.MULTILINE)]


@pytest.mark.usefixtures("ends")  # they run meanwhile
def test_time_limit_on_two_nodes(slurm: Cluster, demo_data: Path, tiny: Path, fault_row: FaultRow) -> None:
    """USR1, as before the time limit: saved, requeued, resumed without a repeated step, from the submitted code."""
    options = (*SMALL, "--nodes=2", "--cpus-per-task=4")
    flags = ("--config", str(tiny), "--train-iters", "60", "--seed", "5")
    job = slurm.submit("real", *flags, options=options, data=demo_data)
    logs = slurm.logs("real", job)
    output = logs / "start-0" / "n1.log"
    wait_for("step 10", lambda: output.exists() and 10 in steps_of(output), 240)
    code = slurm.checkout / "pretrain_genlip.py"
    text = code.read_text()
    code.write_text("raise SystemExit('not what was submitted')")
    slurm.lab.on("scancel", "--signal=USR1", "--batch", job)
    try:
        assert slurm.ended(job, 240) == ("COMPLETED", 1)
    finally:
        code.write_text(text)
    first, second = (steps_of(logs / f"start-{i}" / "n1.log") for i in range(2))
    assert first + second == list(range(1, 61)) and second
    stopped, done = slurm.starts("real", job)
    assert f"| steps 0 to {first[-1]} | requeued at step {first[-1]}, 0 starts without progress" in stopped
    assert f"| steps {first[-1]} to 60 | done" in done
    assert "told the training to save and leave" in (logs / "start-0" / "job.log").read_text()
    for rank, node in enumerate(("n1", "n2")):
        files = list((logs / "start-1" / node).glob(f"{job}.1_*/attempt_0/0/stdout.log"))
        assert len(files) == 1 and ("iteration" in files[0].read_text()) == (rank == 0)
    assert "TCPStore.cpp" not in output.read_text() and "frame #" not in (logs / "start-1" / "n1.log").read_text()
    assert "\nseed: 5\n" in re.sub(r"\n +", "\n", (logs / "code" / "config.yaml").read_text())
    fault_row("SLURM: time limit", "USR1 to the real training, 2 nodes", "saved, requeued, no step repeated or lost")


def test_requeued_as_long_as_it_helps(slurm: Cluster, ends: dict[str, tuple[str, str]], fault_row: FaultRow) -> None:
    wrong = []
    for training, (run, job) in ends.items():
        state, requeues, text = ENDS[training]
        found = slurm.ended(job)
        if found != (state, requeues) or text not in slurm.starts(run, job)[-1]:
            wrong.append((training, found, slurm.starts(run, job)))
        launches = (slurm.folder / run / "launches").read_text()
        assert re.findall(r"--rdzv-id (\S+)", launches) == [f"{job}.{i}" for i in range(requeues + 1)]
    assert not wrong
    fault_row("SLURM: the training fails", "status 2, 18, 19 or stop file", "not requeued", 5)
    fault_row("SLURM: the training fails", "after a newer checkpoint, or once", "requeued, resumed", 4)
    fault_row("SLURM: the training fails", "without a newer checkpoint", "requeued twice, then ended")


def test_a_wrong_flag_takes_one_start(slurm: Cluster, demo_data: Path, tiny: Path, fault_row: FaultRow) -> None:
    job = slurm.submit("wrong", "--config", str(tiny), "--train-itres", "60", data=demo_data)
    missing = slurm.submit("missing", "--config", str(tiny), data=demo_data / "nowhere")
    for run, number, error in (
        ("wrong", job, "unknown flag --train-itres. Did you mean '--train-iters'?"),
        ("missing", missing, "data.tokenizer = "),
    ):
        assert slurm.ended(number) == ("FAILED", 0)
        assert error in (slurm.logs(run, number) / "start-0" / "job.log").read_text()
        assert "not requeued: the settings are wrong" in slurm.starts(run, number)[0]
        assert not (slurm.folder / run / "launches").exists()
    fault_row("SLURM: wrong setting or file", "before the start", "one line, other nodes not started; not requeued", 2)


def test_dry_run_on_the_log_in_node(slurm: Cluster, demo_data: Path, tiny: Path) -> None:
    environment = {
        "PATH": f"{VENV}:{slurm.lab.environment['PATH']}",
        "RUN": str(slurm.folder / "dry"),
        "TOKENIZER": str(demo_data / "tokenizer.model"),
        "TRAIN_DATA": f"{demo_data}/train-*.tar",
        "VALID_DATA": f"{demo_data}/val-*.tar",
    }
    script = slurm.checkout / "examples" / "slurm_stage1.sbatch"
    flags = ("--config", str(tiny), "--global-batch-size", "64", "--dry-run")
    shown = slurm.lab.on(str(script), *flags, **environment)
    assert "dry run passed | train samples 160 | valid samples 24 | world size 64 |" in shown
    assert "Submit this script with sbatch" in slurm.lab.on("bash", "-c", f"{script} 2>&1", check=False, **environment)


def test_a_signal_reaches_only_its_job(slurm: Cluster, fault_row: FaultRow) -> None:
    """Two jobs on one node; they also use different ports."""
    training = '[ $SLURM_RESTART_COUNT ] && exit 0; until_told; saved 3; exit 1'  # fmt: skip
    here = (*SMALL, "--nodelist=n1")
    told, other = (slurm.submit(run, training=training, options=here) for run in ("told", "other"))
    slurm.waits("told")
    slurm.waits("other")
    slurm.lab.on("scancel", "--signal=USR1", "--batch", told)
    assert slurm.ended(told) == ("COMPLETED", 1)
    assert slurm.lab.field(other, "JobState") == "RUNNING" and not slurm.starts("other", other)
    slurm.lab.on("scancel", other)
    assert slurm.ended(other) == ("CANCELLED", 0)
    ports = {
        re.findall(r"--rdzv-endpoint n1:(\d+)", (slurm.folder / run / "launches").read_text())[0]
        for run in ("told", "other")
    }
    assert len(ports) == 2
    fault_row("SLURM: two jobs on a node", "USR1 to one", "the other trains on; own ports")


def test_an_old_torch_is_told_by_the_stop_file(slurm: Cluster) -> None:
    """Its torchrun would kill the workers 30 s after a signal. The job's own stop file is not a person's."""
    obey = 'mv "$save/stop" "$save/stop.obeyed"; saved 3; exit 1'
    wait = 'touch "$RUN/waits"; until [ -e "$save/stop" ]; do sleep 0.1; done'
    training = f"[ $SLURM_RESTART_COUNT ] && exit 0; {wait}; {obey}"
    (slurm.folder / "old").mkdir()
    (slurm.folder / "old" / "old_torch").touch()
    job = slurm.submit("old", training=training)
    slurm.waits("old")
    slurm.lab.on("scancel", "--signal=USR1", "--batch", job)
    assert slurm.ended(job) == ("COMPLETED", 1)
    assert "steps 0 to 3 | requeued" in slurm.starts("old", job)[0]
    assert not (slurm.folder / "old" / "stage1" / "stop.obeyed").exists()


def test_a_cancelled_job_stays_cancelled(slurm: Cluster, fault_row: FaultRow) -> None:
    """One node has failed, and the step is still being ended on the other when the job is cancelled."""
    training = (
        '[ $SLURMD_NODENAME = n2 ] && exit 1; trap "" TERM; touch $RUN/waits; for i in {1..60}; do sleep 0.1; done'
    )
    job = slurm.submit("cancelled", training=training, options=("--nodes=2", "--gpus-per-node=1"))
    slurm.waits("cancelled")
    time.sleep(1)
    assert slurm.lab.field(job, "JobState") == "RUNNING"
    slurm.lab.on("scancel", job)
    assert slurm.ended(job) == ("CANCELLED", 0)
    wait_for("the script has ended", lambda: slurm.starts("cancelled", job))
    assert "not requeued by this script: SLURM ended the job" in slurm.starts("cancelled", job)[0]
    time.sleep(6)  # longer than a requeued job waits
    assert slurm.ended(job) == ("CANCELLED", 0)
    fault_row("SLURM: scancel", "while a failed step ends, 2 nodes", "stays cancelled")


@pytest.mark.parametrize("partition", ["main", "grace"])
def test_a_preemption_during_the_start_is_not_counted(slurm: Cluster, partition: str, fault_row: FaultRow) -> None:
    run = f"preempted-{partition}"
    training = "[ $SLURM_RESTART_COUNT ] && exit 0; touch $RUN/waits; sleep 60; exit 1"
    options = ("--nodes=2", "--gpus-per-node=1", f"--partition={partition}")
    job = slurm.submit(run, training=training, options=options)
    slurm.waits(run)
    # As if it had failed twice before, so that this start would be the last that is counted.
    (slurm.folder / run / "stage1" / "requeues_without_progress").write_text(f"{job} 3 0")
    urgent = ("--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1", "--output=/dev/null")
    slurm.lab.on("sbatch", *urgent)
    assert slurm.ended(job) == ("COMPLETED", 1)
    grace = "with" if partition == "grace" else "without"
    fault_row("SLURM: preemption", f"before the first step, {grace} grace time", "not counted, requeued")


@pytest.mark.long
def test_an_unfit_node_is_excluded(slurm: Cluster, fault_row: FaultRow) -> None:
    (slurm.folder / "unfit").mkdir()
    smi = slurm.stand_ins / "nvidia-smi"  # one GPU on each node; on n1 another process uses it
    smi.write_text(
        "#!/usr/bin/env bash\n[ $1 = -L ] && { echo 'GPU 0: none'; exit; }\n"
        "[ $SLURMD_NODENAME = n1 ] && echo 70000 || echo 5\n"
    )
    smi.chmod(0o755)
    try:
        job = slurm.submit("unfit", training="saved 1")
        assert slurm.ended(job) == ("COMPLETED", 1)
    finally:
        smi.unlink()
    first, second = slurm.starts("unfit", job)
    assert "| nodes n1 |" in first and "requeued without n1 another process uses 70000 MiB of a GPU" in first
    assert "| nodes n2 |" in second and "done" in second
    fault_row("SLURM: unfit node", "GPU memory in use", "requeued on other nodes")


@pytest.mark.parametrize(
    ("training", "states"),
    [
        (
            "[[ $SLURM_JOB_NAME = *1 && ! $SLURM_RESTART_COUNT ]] && exit 1; exit 0",
            [("COMPLETED", 1), ("COMPLETED", 0)],
        ),
        ('echo "19 $launch 1" >"$save/final_exit"; exit 1', [("FAILED", 0), ("CANCELLED", 0)]),
    ],
)
def test_both_stages_in_a_chain(
    training: str, states: list[tuple[str, int]], slurm: Cluster, tmp_path: Path, fault_row: FaultRow
) -> None:
    """Stage 2 waits until stage 1 is done, through its requeue. If stage 1 fails, stage 2 leaves the queue."""
    folder = tmp_path / "checkout"
    shutil.copytree(slurm.checkout, folder)
    for script in folder.glob("examples/*.sbatch"):  # the cluster has two nodes
        script.write_text(re.sub(r"--nodes=\d+", "--nodes=1", script.read_text()))
    stage2 = {"STAGE2_TRAIN_DATA": "x", "STAGE2_VALID_DATA": "x"}
    training = f"echo $SLURM_JOB_NAME $TRAIN_DATA >>$RUN/order; {training}"
    environment = slurm.environment(tmp_path / "run", training, Path("data")) | stage2
    (tmp_path / "run").mkdir()
    jobs = re.findall(r"job (\d+)", slurm.lab.on("examples/slurm_chain.sh", cwd=folder, **environment))
    assert [slurm.ended(job) for job in jobs] == states
    order = (tmp_path / "run" / "order").read_text().split("\n")
    data = "data/train-*.tar"
    assert order[:-1] == (
        [f"genlip-stage1 {data}"] * 2 + ["genlip-stage2 x"]
        if states[1][0] == "COMPLETED"
        else [f"genlip-stage1 {data}"]
    )
    outcome = "starts when stage 1 is done" if states[1][0] == "COMPLETED" else "leaves the queue"
    fault_row("SLURM: stage 2 in a chain", f"stage 1 {'requeued' if states[0][1] else 'failed'}", outcome)


@pytest.mark.long
def test_an_array_indexes_data(slurm: Cluster, demo_data: Path, tmp_path: Path, fault_row: FaultRow) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(slurm.checkout, folder)
    shutil.copytree(CHECKOUT / "tools", folder / "tools")
    for i in range(4):
        shutil.copy(demo_data / "train-00000.tar", tmp_path / f"train-{i:05d}.tar")
    environment = {
        "PATH": f"{VENV}:{slurm.lab.environment['PATH']}",
        "TOKENIZER": str(demo_data / "tokenizer.model"),
        "DATA": f"{tmp_path}/train-*.tar",
    }
    script = "examples/slurm_data_array.sbatch"
    array = slurm.lab.on("sbatch", "--parsable", "--array=0-1", script, cwd=folder, **environment)
    options = ("--parsable", f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", "--array=0")
    last = slurm.lab.on("sbatch", *options, script, "manifest", cwd=folder, **environment)
    assert slurm.ended(last, 240) == ("COMPLETED", 0)
    assert len(list(tmp_path.glob("*.index.safetensors"))) == 4 and (tmp_path / "train.dataset.json").exists()
    assert "4 shards (4 unchanged)" in (folder / f"genlip-index-{last}.log").read_text()
    fault_row("SLURM: data array", "two jobs, then one for the manifest", "every shard indexed once")


@pytest.mark.parametrize("node", ["n2", pytest.param("n1", marks=pytest.mark.long)])
def test_a_lost_node(slurm: Cluster, node: str, fault_row: FaultRow) -> None:
    """n1 runs the job's script."""
    run = f"lost-{node}"
    training = "[ $SLURM_RESTART_COUNT ] && { saved 9; exit 0; }; saved 4; touch $RUN/waits; sleep 60; exit 1"
    job = slurm.submit(run, training=training, options=("--nodes=2", "--gpus-per-node=1"))
    slurm.waits(run)
    slurm.lab.kill(node)
    slurm.lab.wait_for_state(job, "PENDING")
    slurm.lab.boot(node)
    assert slurm.ended(job) == ("COMPLETED", 1)
    assert "steps 4 to 9 | done" in slurm.starts(run, job)[-1]
    what = "the node of the script" if node == "n1" else "another node"
    fault_row("SLURM: a node is lost", what, "requeued, resumed when the node is back")


@pytest.mark.long
def test_a_real_time_limit(slurm: Cluster, fault_row: FaultRow) -> None:
    training = "[ $SLURM_RESTART_COUNT ] && exit 0; until_told; saved 3; exit 1"
    job = slurm.submit("limit", training=training, options=(*SMALL, "--time=2", "--signal=B:USR1@60"))
    assert slurm.ended(job, 180) == ("COMPLETED", 1)
    assert "steps 0 to 3 | requeued at step 3" in slurm.starts("limit", job)[0]
    fault_row("SLURM: time limit", "of two minutes, the training waits", "told a minute before; requeued")
