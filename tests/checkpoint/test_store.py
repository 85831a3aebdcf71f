"""A checkpoint folder is complete or absent, and loading from the wrong place says what is wrong."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path

import pytest

from genlip_megatron.checkpoint import store
from genlip_megatron.config import RunConfig
from tests.distributed import run_distributed
from tests.runs import run_steps, tiny_config


def test_a_partial_folder_of_a_crash_is_ignored_and_replaced(demo_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    config = tiny_config(demo_data, checkpoint__save=str(root), checkpoint__load=str(root))
    run_distributed(1, run_steps, config, 2)
    assert store.latest_iteration(root) == 2
    # What a kill in the middle of the next save leaves behind.
    left = root / ".iter_0000004.partial"
    left.mkdir()
    (left / "common.pt").write_bytes(b"half")
    assert store.latest_iteration(root) == 2
    run_distributed(1, run_steps, config, 4)
    assert store.latest_iteration(root) == 4
    assert sorted(path.name for path in root.iterdir() if path.name.startswith((".", "iter_"))) == [
        "iter_0000002",
        "iter_0000004",
    ]


def test_pointer_to_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / store.LATEST).write_text("7\n")
    with pytest.raises(ValueError, match=r"names step 7, but .*iter_0000007 is missing"):
        store.resolve(tmp_path)


def test_a_folder_without_configuration_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "iter_0000007").mkdir()
    (tmp_path / store.LATEST).write_text("7\n")
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no config\.yaml"):
        store.read_config(store.resolve(tmp_path)[0])


def test_too_little_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ValueError, match=r"0\.00 GB free, one checkpoint of 1000000 parameters takes 0\.01 GB; free"):
        store.check_free_space(tmp_path / "new", RunConfig(), 10**6)
