"""Probes as a whole: a killed one resumes, ranks agree, heads learn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from genlip_megatron.encoders import others
from genlip_megatron.evaluate import classify
from genlip_megatron.evaluate.probe_state import ProbeFolder
from genlip_megatron.testing.distributed import run_distributed
from tests.evaluate import probes


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return probes.class_folders(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return probes.ade_folders(tmp_path_factory.mktemp("masks"))


def equal(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    """Check that two probes found the same."""
    same = {"seconds", "tensors"}
    assert {k: v for k, v in one.items() if k not in same} == {k: v for k, v in other.items() if k not in same}
    torch.testing.assert_close(one.get("tensors", {}), other.get("tensors", {}), **tolerance)


class Killed(Exception):
    """What ends the process."""


@pytest.mark.parametrize("task", ["crop", "none", "dinov3"])
def test_a_killed_probe_resumes_as_if_it_had_not_been(
    task: str, classes: Path, masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, **options: Any) -> dict[str, Any]:
        if task == "dinov3":
            return probes.run_segment(masks, tmp_path / name, **options)
        return probes.run_classify(classes, tmp_path / name, dataclasses.replace(probes.TINY, augment=task), **options)

    whole = run("whole")
    save, steps = ProbeFolder.save, []

    def save_and_die(folder: ProbeFolder, step: int, tensors: Any) -> None:
        save(folder, step, tensors)
        steps.append(step)
        if step == 4:
            raise Killed

    monkeypatch.setattr(ProbeFolder, "save", save_and_die)
    with pytest.raises(Killed):
        run("killed", save_interval=2)
    monkeypatch.setattr(ProbeFolder, "save", lambda *_: steps.append(_[1]) or save(*_))
    equal(run("killed"), whole, rtol=0, atol=0)
    assert steps == [2, 4, 6]  # the second run did steps 5 and 6


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(classes: Path, masks: Path, tmp_path: Path) -> None:
    one = probes.several(classes, masks, tmp_path / "one")
    for rank in run_distributed(2, probes.several, classes, masks, tmp_path / "two"):
        for ours, theirs in zip(rank, one, strict=True):
            equal(ours, theirs, rtol=1e-4, atol=1e-5)


def test_heads_learn_colours(classes: Path, masks: Path, tmp_path: Path) -> None:
    longer = dataclasses.replace(probes.TINY, steps=40, learning_rates=(1e-9, 3e-2))
    found = probes.run_classify(classes, tmp_path / "classify", longer)
    assert found["accuracy"] == 1.0 and found["learning_rate"] == 3e-2
    assert found["train_images"] == 22 and found["held_out_images"] == 2 and found["val_images"] == 9
    assert probes.run_segment(masks, tmp_path / "linear", "dinov2", steps=60)["miou"] > 0.7
    assert probes.run_segment(masks, tmp_path / "nearest", "knn-capi")["miou"] > 0.7


def test_nearest_neighbours_are_sklearns() -> None:
    rng = np.random.default_rng(0)
    bank, queries = (rng.normal(size=(count, 8)) for count in (60, 25))
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    labels = rng.integers(0, 4, 60)
    found = classify.neighbour_votes(*map(torch.from_numpy, (bank, labels, queries)), 4, (1, 5, 20), 0.07)
    for k, row in zip((1, 5, 20), found, strict=True):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        assert row.tolist() == theirs.fit(bank, labels).predict(queries).tolist()


def test_learning_rates_of_the_presets() -> None:
    assert [len(preset.grid(preset.batch_size)) for preset in classify.PRESETS.values()] == [30, 14, 1, 13]
    assert max(classify.PRESETS["capi"].grid(1024)) == (4e-2, 5e-2)
    assert max(classify.PRESETS["aimv2"].grid(512)) == (2e-3, 0.1)


def test_an_error_without_a_message_is_named_by_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise EOFError

    folder = ProbeFolder(tmp_path, {})
    folder.save(1, {})
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError, match=r"damaged \(EOFError\)"):
        folder.load(torch.device("cpu"))
    library = SimpleNamespace(create_model=fail)
    monkeypatch.setattr(others, "_need", lambda *_: library)
    for open_one in (others.open_timm, others.open_open_clip):
        with pytest.raises(ValueError, match=r"cannot open it \(EOFError\)"):
            open_one("x", "x", layer="", device=torch.device("cpu"), dtype=torch.float32, random_weights=True)
