"""The exported graphs equal the model, also on sizes that they were not traced with."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel
from tools import export_encoder

Tool = Callable[..., str]
SIZES = [(1, 3, 32, 32), (3, 3, 48, 208), (5, 3, 208, 48)]


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_graph_equals_the_model_on_any_size(exported: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    model = GenLIPVisionModel.from_pretrained(exported).eval()
    graph = export_encoder.export_encoder(model, tmp_path / f"encoder.{suffix}")
    assert export_encoder.worst_difference(model, graph) < export_encoder.TOLERANCE
    for size in SIZES:
        pixels = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(graph(pixels), model(pixels).last_hidden_state, rtol=0, atol=1e-4)
    for sides in ((70, 96), (64, 100)):
        with pytest.raises(Exception, match=r"16|reshape"):  # each runtime raises its own class
            graph(torch.zeros(1, 3, *sides))


def test_a_difference_is_reported(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "encoder.pt2"
    assert export_encoder.main([str(exported), str(output)]) == 0
    assert list(tmp_path.iterdir()) == [output]
    assert "largest difference" in capsys.readouterr().out
    model = GenLIPVisionModel.from_pretrained(exported).eval()
    model.visual.layers[1].self_attn.out_proj.weight.data *= 1.01
    assert export_encoder.worst_difference(model, torch.export.load(output).module()) > export_encoder.TOLERANCE


def misshape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "ln_post.bias": torch.zeros(5)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "output", "part"),
    [
        (
            lambda place: (place / "model.safetensors").write_bytes(b"\xff" * 99),
            "new/encoder.pt2",
            r"model\.safetensors: damaged or cut off",
        ),
        # Before version 5 transformers does not report the shapes.
        (misshape, "new/encoder.pt2", r"ln_post.bias (is \[5\], \[96\]|has another shape than) expected"),
        (lambda place: (place / "config.json").unlink(), "new/encoder.pt2", "no config.json"),
        (lambda place: None, "new/encoder.bin", "Allowed are .onnx and .pt2"),
        (lambda place: None, "none/encoder.pt2", "no folder"),
        (lambda place: None, "there.pt2", "already exists. Name another file, or replace it with --overwrite"),
    ],
)
def test_user_errors_are_one_line(
    harm: Callable[[Path], Any], output: str, part: str, exported: Path, tmp_path: Path, tool: Tool
) -> None:
    folder = shutil.copytree(exported, tmp_path / "folder")
    harm(folder)
    (tmp_path / "new").mkdir()
    (tmp_path / "there.pt2").write_text("mine")
    assert re.search(part, tool(export_encoder.main, folder, tmp_path / output, status=2))


# The tool recognises its own files by this.
OLD = "old: vision_embeddings, pixel_values"


@pytest.mark.parametrize("failure", ["the exporter", "the comparison", "SIGTERM"])
def test_a_failed_export_keeps_the_earlier_file(
    failure: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "encoder.pt2"
    output.write_text(OLD)

    def write(model: Any, file: Path) -> Any:
        file.write_text("half")
        if failure == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        if failure == "the exporter":
            raise RuntimeError("no kernel\nand more")
        return lambda pixels: model(pixels).last_hidden_state * 1.01

    monkeypatch.setattr(export_encoder, "export_encoder", write)
    (tmp_path / ".encoder.pt2.partial-0123abcd").mkdir()
    words = [str(exported), str(output), "--overwrite"]
    if failure == "SIGTERM":
        with pytest.raises(SystemExit, match="143"):
            export_encoder.main(words)
    else:
        status = export_encoder.main(words)
        said = capsys.readouterr().err
        assert status == (2 if failure == "the exporter" else 1) and "and more" not in said
        assert ("the export failed: no kernel" if status == 2 else "nothing was written") in said
    assert list(tmp_path.iterdir()) == [output] and output.read_text() == OLD
