"""tools/demo.py: what it compares is computed alike on every machine."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tools import demo


def test_compared_captions_are_made_in_float32_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU, in bfloat16, two right programs may choose different tokens."""
    calls: dict[str, tuple[list[str], dict[str, Any]]] = {}

    def run(*command: Any, cwd: Path = demo.ROOT, **environment: str) -> str:
        words = [str(word) for word in command]
        calls[next(Path(word).name for word in words if word.endswith(".py"))] = words, environment
        return ""

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "read_rows", lambda file: [])
    demo.export(tmp_path / "iter", "val.tar", "4")
    words, environment = calls["caption.py"]
    for flag, value in (("--dtype", "fp32"), ("--device", "cpu")):
        assert words[words.index(flag) + 1] == value
    assert environment["CUDA_VISIBLE_DEVICES"] == calls["caption_exported.py"][1]["CUDA_VISIBLE_DEVICES"] == ""
    assert "dtype=torch.float32" in (demo.ROOT / "tools/caption_exported.py").read_text()


def test_captions_of_no_image_are_a_mistake_told_in_one_line(tmp_path: Path) -> None:
    shard = tmp_path / "empty.tar"
    tarfile.open(shard, "w").close()
    for words, part in (
        ([], f"{shard}: no image there; expected .jfif, .jp"),
        (["--limit", "0"], "--limit 0: must be at"),
    ):
        command = [
            sys.executable,
            "-I",
            demo.ROOT / "tools/caption_exported.py",
            tmp_path,
            shard,
            "--output",
            "x",
            *words,
        ]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert ended.returncode == 2 and part in ended.stderr.splitlines()[-1]
