"""Checkpoints of a tiny model, images, and a way to run the tools."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import layout, tiny_config
from tests.convert.test_round_trips import saved


@pytest.fixture(scope="session")
def checkpoints(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{layout: folder of a run saved on it}."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("1", "TP2"):
        processes, sizes = layout(name)
        config = tiny_config(demo_data, checkpoint__save=str(root / name), data__num_workers=1, **sizes)
        run_distributed(processes, saved, config, True)
    return {name: root / name for name in ("1", "TP2")}


@pytest.fixture(scope="session")
def exported(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a Hugging Face folder."""
    from tools.convert_checkpoint import main

    target = tmp_path_factory.mktemp("exported") / "model"
    assert main(["to-hf", str(checkpoints["1"]), "--output", str(target)]) == 0
    return target


@pytest.fixture(scope="session")
def photos(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes and formats, some in a subfolder; a broken one, a truncated one, and a text file."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    with tarfile.open(demo_data / "val-00000.tar") as members:
        found = [members.extractfile(m) for m in members if m.name.endswith((".jpg", ".png"))]
        contents = [file.read() for file in found[:5] if file is not None]
    for i, content in enumerate(contents):
        image = Image.open(io.BytesIO(content)).convert("RGB").resize((60 + 40 * i, 150 - 20 * i))
        image.save(folder / ("more" if i % 2 else "") / f"image{i}.{('png', 'jpg', 'webp')[i % 3]}")
    (folder / "broken.jpg").write_bytes(b"this is no image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    (folder / "short.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a tool; check its status, and that an error leaves no files. Returns its output or error line."""

    def run(main: Callable[[list[str]], int], *words: Any, status: int = 0) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        try:
            found = main([str(word) for word in words])
        except SystemExit as end:  # argparse
            found = int(end.code or 0)
        said = capsys.readouterr()
        assert found == status, said.err
        if status != 2:
            return said.out
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        (line,) = (line for line in said.err.splitlines() if "error: " in line)
        return line

    return run
