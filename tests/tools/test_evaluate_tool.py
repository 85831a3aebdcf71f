"""What `make evaluate` says of its rows: known-good numbers that do not hold, and controls that are not beaten."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluate import Skipped, Work, beaten, known_good

ROWS = [
    "| photographs, 6 classes, linear probe, top-1, % | GenLIP, trained here | 50.0 |",
    "| photographs, 6 classes, linear probe, top-1, % | the same, random weights | 50.0 |",
    "| photographs, 6 classes, linear probe, top-1, % | pixels of a patch | 46.0 |",
    "| photographs, 6 classes, linear probe, top-1, % | EfficientNet-lite0, ImageNet | 87.7 |",
    "| captions through SmolLM2, PPL1 with its / another / no image | GenLIP, trained here | 30.0 / 31.0 / 40.0 |",
    "| captions through SmolLM2, PPL1 with its / another / no image | the same, random weights | 32.0 / 31.0 / 40.0 |",
]


def test_a_control_that_is_not_beaten_is_said() -> None:
    noted = beaten(ROWS)
    assert noted[0].endswith("| 50.0 (does not beat its control) |") and noted[1:] == ROWS[1:]
    worse = [*ROWS[:4], ROWS[4].replace("30.0 /", "33.0 /"), ROWS[5]]
    assert "does not beat" in beaten(worse)[4]


def test_known_good_numbers() -> None:
    assert known_good(ROWS) == []
    (line,) = known_good([*ROWS[:3], ROWS[3].replace("87.7", "61.0")])
    assert "EfficientNet-lite0, ImageNet: 61.0, expected 80 to 100" in line


def test_a_part_is_made_once_and_never_half(tmp_path: Path) -> None:
    work = Work(tmp_path, quick=True, train_iters=1)

    def fails(place: Path) -> list[str]:
        (place / "half").touch()
        raise Skipped("no network")

    with pytest.raises(Skipped):
        work.part("data", fails)
    assert not (tmp_path / "data").exists()
    made = work.part("data", lambda place: (place / "whole").touch())
    assert work.part("data", fails) == made and [path.name for path in made.iterdir()] == ["whole"]
    assert work.try_part("zero-shot", lambda: fails(made)) == [] and work.skipped == ["zero-shot: no network"]
