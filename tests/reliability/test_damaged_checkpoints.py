"""A damaged checkpoint is never loaded: an error names the file, and the newest good checkpoint is used."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from genlip_megatron.checkpoint import loading
from genlip_megatron.checkpoint import paths as checkpoints
from genlip_megatron.testing.processes import Zygote
from tests.fault_table import FaultRow
from tests.reliability.training import Training, all_of

pytestmark = pytest.mark.faults

FLIPS = 5


def looking(training: Training) -> dict[str, str]:
    """Settings of a launch that loads and trains, but saves nothing."""
    return {"checkpoint__save": "", "checkpoint__load": str(training.run)}


def flip(seed: int) -> Callable[[Path], None]:
    """Change one bit of a file at a random place."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        place = random.Random(f"{seed} {file.name}").randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)

    return damage


def halve(file: Path) -> None:
    """Cut a file to half its size."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "one flipped bit": flip(0),
    "removed": Path.unlink,
    "cut to half": halve,
    "emptied": lambda file: file.write_bytes(b"") and None,
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)) and None,
    **{f"one flipped bit, place {seed}": flip(seed) for seed in range(1, FLIPS)},
}
QUICK = ("one flipped bit", "removed")


@pytest.fixture(scope="module")
def trained(zygote: Zygote, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run with good checkpoints of steps 2 and 4."""
    training = Training(zygote, demo_data, tmp_path_factory.mktemp("damage") / "start", 1, {"model__num_layers": 1})
    assert training.go("--exit-interval", "4")[0].code == 0
    return training


def files(training: Training) -> list[str]:
    """Every file of the newest checkpoint."""
    folder = checkpoints.step_folder(training.run, 4)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def faults_of(trained: Training, folder: Path, cases: list[tuple[str, str]]) -> list[str]:
    """Errors of loading after each (file, damage), one at a time."""

    def start(case: tuple[str, str]) -> object:
        training = trained.copy(folder / hashlib.sha256(str(case).encode()).hexdigest()[:12])
        DAMAGES[case[1]](checkpoints.step_folder(training.run, 4) / case[0])
        (training.folder / "history" / "rank0.jsonl").unlink()
        jobs[case] = training
        return training.start("--exit-interval", "3", **looking(training))

    jobs: dict[tuple[str, str], Training] = {}
    expected = trained.history()[0, 3]
    faults = []
    for (file, damage), (ended,) in all_of(cases, start):  # type: ignore[arg-type]
        output = ended.output
        steps = jobs[file, damage].history()
        if ended.code or "resumed at step 2" not in output:
            faults.append(f"{file} {damage}: not resumed at step 2 (status {ended.code}): {output[-800:]}")
        elif Path(file).name not in output:
            faults.append(f"{file} {damage}: the output does not name the file: {output[-800:]}")
        elif steps != {(0, 3): expected}:
            faults.append(f"{file} {damage}: step 3 is not the undisturbed run's")
    return faults


@pytest.mark.slow
def test_a_damaged_file_is_named_and_the_previous_checkpoint_used(trained: Training, tmp_path: Path) -> None:
    cases = [(file, damage) for file in files(trained) for damage in QUICK]
    faults = faults_of(trained, tmp_path, cases)
    assert not faults, "\n".join(faults)


@pytest.mark.long
def test_any_damage_to_any_file_is_found(trained: Training, tmp_path: Path, fault_row: FaultRow) -> None:
    names = files(trained)
    faults = faults_of(trained, tmp_path, [(file, damage) for file in names for damage in DAMAGES])
    assert not faults, "\n".join(faults)
    for damage in DAMAGES:
        kind = damage.split(",")[0]
        fault_row(
            f"checkpoint file: {kind}",
            f"each of the {len(names)} files",
            "not loaded, file named, previous checkpoint used",
            count=len(names),
        )


@pytest.mark.parametrize(
    ("content", "resumed"),
    [(None, "removed"), (b"", "empty"), (b"\xff\x00", "garbage"), (b"1000\n", "missing checkpoint")],
    ids=["removed", "empty", "garbage", "names a missing checkpoint"],
)
def test_a_damaged_pointer_does_not_hide_good_checkpoints(
    trained: Training, tmp_path: Path, content: bytes | None, resumed: str, fault_row: FaultRow
) -> None:
    training = trained.copy(tmp_path / "run")
    pointer = training.run / checkpoints.LATEST
    if content is None:
        pointer.unlink()
    else:
        pointer.write_bytes(content)
    (ended,) = training.go("--exit-interval", "5", **looking(training))
    assert ended.code == 0 and "resumed at step 4" in ended.output, ended.output[-1500:]
    fault_row("latest_checkpointed_iteration.txt damaged", resumed, "newest good checkpoint used")


def test_without_a_good_checkpoint_nothing_is_loaded(trained: Training, tmp_path: Path) -> None:
    """A run does not silently start new over its damaged checkpoints."""
    training = trained.copy(tmp_path / "run")
    before = sorted(training.run.rglob("*"))
    for step in 2, 4:
        DAMAGES["one flipped bit"](checkpoints.step_folder(training.run, step) / ".metadata")
    (training.folder / "history" / "rank0.jsonl").unlink()
    (ended,) = training.go("--exit-interval", "5")
    assert ended.code != 0 and ".metadata" in ended.output, ended.output[-1500:]
    assert not training.history()
    assert sorted(training.run.rglob("*")) == before


def test_a_damaged_checkpoint_is_set_aside_and_its_step_saved_again(
    trained: Training, tmp_path: Path, fault_row: FaultRow
) -> None:
    training = trained.copy(tmp_path / "run")
    name = next(file for file in files(trained) if file.endswith(".distcp"))
    damaged = checkpoints.step_folder(training.run, 4) / name
    DAMAGES["one flipped bit"](damaged)
    content = damaged.read_bytes()
    (ended,) = training.go("--exit-interval", "4")
    assert ended.code == 0 and "resumed at step 2" in ended.output, ended.output[-1500:]
    assert (training.run / checkpoints.SET_ASIDE / "iter_0000004" / name).read_bytes() == content
    assert damaged.read_bytes() != content
    found = loading.find(training.run, True, print)
    assert found is not None and found[1].iteration == 4
    assert training.history() == trained.history()
    fault_row("checkpoint file: one flipped bit", "the run continues", "damaged one set aside, step saved again")
