"""A damaged checkpoint is never loaded: an error names the file, and the newest good checkpoint is used."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from genlip_megatron.checkpoint import loading
from genlip_megatron.checkpoint import paths as checkpoints
from genlip_megatron.faults.exits import EXIT_USER_ERROR
from genlip_megatron.testing.processes import Ended, Job, Zygote
from tests.fault_table import FaultRow
from tests.reliability.training import Training, all_of

pytestmark = pytest.mark.faults

FLIPS = 5


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


def fault_of(training: Training, ended: Ended, file: str, whole: Training) -> str:
    """The problem of a run that resumed after a file of its newest checkpoint was damaged, or ""."""
    output = ended.output
    if ended.code or "resumed at step 2" not in output:
        return f"not resumed at step 2 (status {ended.code}): {output[-800:]}"
    if file not in output:
        return f"the output does not name the file: {output[-800:]}"
    step = {(0, 3): whole.history()[0, 3]}
    return "" if training.history() == step else "step 3 is not the undisturbed run's"


@pytest.mark.slow
@pytest.mark.parametrize(
    "damages",
    [("one flipped bit", "removed"), pytest.param(tuple(DAMAGES), marks=pytest.mark.long)],
    ids=["some", "all"],
)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_used(
    damages: tuple[str, ...], trained: Training, tmp_path: Path, fault_row: FaultRow
) -> None:
    names = files(trained)
    runs: dict[tuple[str, str], Training] = {}

    def start(case: tuple[str, str]) -> Job:
        file, damage = case
        runs[case] = training = trained.copy(tmp_path / str(len(runs)))
        DAMAGES[damage](checkpoints.step_folder(training.run, 4) / file)
        (training.folder / "history" / "rank0.jsonl").unlink()
        # It loads and trains, but saves nothing.
        return training.start("--exit-interval", "3", checkpoint__save="", checkpoint__load=str(training.run))

    faults = {
        case: fault_of(runs[case], ended, case[0], trained)
        for case, (ended,) in all_of([(file, damage) for file in names for damage in damages], start)
    }
    assert not any(faults.values()), "\n".join(f"{case}: {fault}" for case, fault in faults.items() if fault)
    for damage in damages if len(damages) == len(DAMAGES) else ():
        fault_row(
            f"checkpoint file: {damage.split(',')[0]}",
            f"each of the {len(names)} files",
            "not loaded, file named, previous checkpoint used",
            count=len(names),
        )


def test_without_a_good_checkpoint_nothing_is_loaded(trained: Training, tmp_path: Path) -> None:
    """A run does not silently start new over its damaged checkpoints."""
    training = trained.copy(tmp_path / "run")
    before = sorted(training.run.rglob("*"))
    for step in 2, 4:
        DAMAGES["one flipped bit"](checkpoints.step_folder(training.run, step) / ".metadata")
    (training.folder / "history" / "rank0.jsonl").unlink()
    (ended,) = training.go("--exit-interval", "5")
    assert ended.code == EXIT_USER_ERROR and "no good checkpoint" in ended.output, ended.output[-1500:]
    assert all(f"iter_000000{step}/.metadata: damaged" in ended.output for step in (2, 4)), ended.output[-1500:]
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
