"""Kept checkpoints: the newest, every Kth and the best of the good ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from genlip_megatron.checkpoint import manifest, paths
from genlip_megatron.checkpoint.manifest import Manifest
from genlip_megatron.checkpoint.retention import Keeper, kept
from genlip_megatron.config import CheckpointConfig

LOSSES = {10: 3.0, 20: 2.0, 30: None, 40: 2.0, 50: 2.5, 60: None}


@pytest.mark.parametrize(
    ("last", "every", "best", "stay"),
    [
        (1, 0, 0, [60]),
        (3, 0, 0, [40, 50, 60]),
        (0, 0, 0, [10, 20, 30, 40, 50, 60]),
        (1, 30, 0, [30, 60]),
        (1, 0, 1, [40, 60]),
        (1, 0, 2, [20, 40, 60]),
        (1, 0, 9, [10, 20, 40, 50, 60]),
        (9, 20, 1, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_last_every_and_best_are_kept(last: int, every: int, best: int, stay: list[int]) -> None:
    assert list(kept(list(LOSSES.items()), last, every, best)) == stay


LAYOUT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "world_size": 8,
}


def test_the_newest_checkpoint_for_any_layout_is_kept_and_a_nan_loss_is_never_best() -> None:
    losses = [(10, 3.0), (20, float("nan")), (30, float("inf")), (40, float("nan"))]
    assert kept(losses, 1, 0, 1, any_layout=[20, 30]) == {10: "best", 30: "any layout", 40: "last"}


def write(root: Path, step: int, loss: float | None = None, kind: str = "dp_reshardable") -> Path:
    """A checkpoint of one file."""
    place = paths.partial_folder(root, step)
    place.mkdir(parents=True)
    (place / "weights.distcp").write_bytes(bytes([step]) * 100)
    files = {"weights.distcp": manifest.facts_of(place / "weights.distcp")}
    (place / manifest.MANIFEST).write_bytes(Manifest(step, kind, LAYOUT, validation_loss=loss, files=files).to_bytes())
    target = paths.publish(root, step)
    paths.confirm(root, step)
    return target


def flip(file: Path) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_never_counted(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step, loss=1.0 if step == 10 else 2.0)
    flip(tmp_path / "iter_0000040" / "weights.distcp")
    flip(tmp_path / "iter_0000010" / "weights.distcp")
    gone, wrong = Keeper().prune(tmp_path, CheckpointConfig(keep_last=2, keep_best=0))
    # The two newest good ones of four stay; damaged ones are neither counted nor deleted.
    assert gone == [] and paths.steps(tmp_path) == [40, 30, 20, 10]
    assert [problem.split(": ")[0] for problem in wrong] == [
        f"{tmp_path}/iter_0000040/weights.distcp",
        f"{tmp_path}/iter_0000010/weights.distcp",
    ]
    write(tmp_path, 50)
    assert Keeper().prune(tmp_path, CheckpointConfig(keep_last=2, keep_best=0))[0] == [20]
    assert paths.steps(tmp_path) == [50, 40, 30, 10]


def test_damage_after_the_first_check_is_found(tmp_path: Path) -> None:
    keeper, options = Keeper(), CheckpointConfig(keep_last=1, keep_best=0)
    write(tmp_path, 10)
    write(tmp_path, 20)
    assert keeper.good(tmp_path)[0].keys() == {10, 20}
    flip(tmp_path / "iter_0000020" / "weights.distcp")
    assert keeper.prune(tmp_path, options) == (
        [],
        [f"{tmp_path}/iter_0000020/weights.distcp: damaged, its SHA-256 does not match the manifest's"],
    )
    assert 10 in paths.steps(tmp_path)


def test_a_dry_run_deletes_nothing(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path, step)
    options = CheckpointConfig(keep_last=1)
    assert Keeper().prune(tmp_path, options, dry_run=True) == ([10], [])
    assert paths.steps(tmp_path) == [20, 10]


@pytest.mark.parametrize(("every", "left"), [(10, [40, 20]), (0, [40])])
def test_one_checkpoint_for_any_layout_is_kept_longer_than_newer_ones(
    every: int, left: list[int], tmp_path: Path
) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step, kind="fully_reshardable" if step < 30 else "dp_reshardable")
    Keeper().prune(tmp_path, CheckpointConfig(keep_last=1, keep_best=0, fully_reshardable_every=every))
    assert paths.steps(tmp_path) == left


def test_a_checkpoint_that_holds_anything_else_is_not_deleted(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    (tmp_path / "iter_0000010" / "notes").mkdir()
    (tmp_path / "iter_0000010" / "notes" / "thesis.txt").write_text("five years of work")
    elsewhere = (tmp_path / "iter_0000020").rename(tmp_path / "elsewhere")
    (tmp_path / "iter_0000020").symlink_to(elsewhere)
    keeper, options = Keeper(), CheckpointConfig(keep_last=1, keep_best=0)
    assert keeper.prune(tmp_path, options) == ([30], [])
    assert paths.steps(tmp_path) == [40, 20, 10] and len(list(elsewhere.iterdir())) == 2
    first, second = keeper.left
    assert f"{tmp_path}/iter_0000010: not deleted" in first and "notes/thesis.txt" in first
    assert f"{tmp_path}/iter_0000020: not deleted" in second and "a link" in second


def test_a_damaged_checkpoint_is_recognised_by_its_files(tmp_path: Path) -> None:
    place = tmp_path / "iter_0000010"
    place.mkdir()
    assert manifest.foreign(place) == "no file of a checkpoint"
    (place / "config.yaml").touch()
    assert manifest.foreign(place) == "no file of a checkpoint"
    (place / "__0_1.distcp").touch()
    assert manifest.foreign(place) == ""
    (place / "thesis.txt").touch()
    assert manifest.foreign(place) == "thesis.txt"
