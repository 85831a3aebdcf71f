"""``--dry-run`` checks a run without starting it, and fails like the run would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genlip_megatron.testing import CHECKOUT
from genlip_megatron.testing.runs import tiny_config
from genlip_megatron.train import dry_run as module
from genlip_megatron.train.dry_run import dry_run


def test_a_good_run_passes(demo_data: Path, tmp_path: Path) -> None:
    line = dry_run(tiny_config(demo_data, checkpoint__save=str(tmp_path / "run")), 4)
    assert line.startswith("dry run passed | train samples 160 | valid samples 24 | world size 4 | parameters ")


@pytest.mark.parametrize(
    ("flags", "world_size", "error"),
    [
        ({"train__global_batch_size": 6}, 4, "train.global_batch_size"),
        ({"data__tokenizer": "/nowhere.json"}, 1, "data.tokenizer"),
        ({"data__train_data": "/nowhere/*.tar"}, 1, "data.train_data"),
        ({"data__valid_data": "/nowhere/*.tar"}, 1, "data.valid_data"),
        ({"checkpoint__save": "/proc/run"}, 1, "checkpoint.save"),
    ],
)
def test_a_wrong_run_is_refused(flags: dict[str, Any], world_size: int, error: str, demo_data: Path) -> None:
    with pytest.raises((ValueError, OSError), match=error):
        dry_run(tiny_config(demo_data, **flags), world_size)


def test_too_little_memory_is_refused(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 2**20

    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "get_device_properties", lambda _: Properties)
    with pytest.raises(ValueError, match="needs an estimated"):
        dry_run(tiny_config(demo_data), 1)


@pytest.mark.slow
def test_the_entry_point_ends_with_status_2(demo_data: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(tiny_config(demo_data, checkpoint__save=str(tmp_path / "run")).to_yaml())
    words = [sys.executable, str(CHECKOUT / "pretrain_genlip.py"), "--config", str(tmp_path / "run.yaml"), "--dry-run"]
    for world_size, status in (("2", 0), ("3", 2)):
        environment = {**os.environ, "WORLD_SIZE": world_size}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == status
        shown = done.stderr if status else done.stdout
        assert shown.count("\n") == 1 and ("train.global_batch_size = 4:" in shown) == bool(status)
    assert not list((tmp_path / "run").iterdir()), "nothing is written"
