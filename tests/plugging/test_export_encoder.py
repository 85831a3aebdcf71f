"""The exported graphs compute what the model does, on sizes that they were not traced with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel
from tools import export_encoder

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


def test_difference_is_seen(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "encoder.pt2"
    export_encoder.main([str(exported), str(output)])
    assert "largest difference" in capsys.readouterr().out
    model = GenLIPVisionModel.from_pretrained(exported).eval()
    model.visual.layers[1].self_attn.out_proj.weight.data *= 1.01
    assert export_encoder.worst_difference(model, torch.export.load(output).module()) > export_encoder.TOLERANCE


def test_unknown_ending_is_refused_before_anything_is_written(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        export_encoder.main([str(exported), str(tmp_path / "encoder.bin")])
    assert "allowed are .onnx and .pt2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
