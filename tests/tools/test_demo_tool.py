"""tools/demo.py: the captions that it compares are computed the same way on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools import demo


def test_compared_captions_are_computed_in_float32_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU in bfloat16 two correct programs may choose different tokens."""
    calls: list[tuple[list[str], dict[str, Any]]] = []

    def run(*command: Any, cwd: Path = demo.ROOT, **environment: str) -> str:
        calls.append(([str(word) for word in command], environment))
        return ""

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "read_rows", lambda file: [])
    demo.export(tmp_path / "iter", "val.tar", "4")
    _, (ours, our_environment), (theirs, their_environment) = calls
    for flag, value in (("--dtype", "fp32"), ("--device", "cpu")):
        assert ours[ours.index(flag) + 1] == value
    assert our_environment["CUDA_VISIBLE_DEVICES"] == their_environment["CUDA_VISIBLE_DEVICES"] == ""
    assert theirs[1:4] == ["-I", "-c", demo.PLAIN_TRANSFORMERS] and "dtype=torch.float32" in theirs[3]
