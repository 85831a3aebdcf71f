"""tools/patch_readout.py: JSON and picture show the likeliest tokens of the model's head on each patch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM

from tools.patch_readout import main

Tool = Callable[..., str]


def test_tokens_are_the_likeliest_of_the_head_on_encoder_features(
    tool: Tool, checkpoints: dict[str, Path], exported: Path, photos: Path, tmp_path: Path
) -> None:
    """The features come from the vision encoder, which never sees text."""
    out = tool(main, photos, "--load", checkpoints["1"], "--output", tmp_path / "readout", "--top", 3)
    assert "readouts of 5 images" in out
    encoder = AutoModel.from_pretrained(exported, trust_remote_code=True).eval()
    whole = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(exported, trust_remote_code=True)
    files = sorted((tmp_path / "readout").glob("0*.json"))
    assert len(files) == 5
    for file in files:
        found = json.loads(file.read_text())
        rows, columns = found["grid"]
        inputs = processor(Image.open(found["path"]), return_tensors="pt")
        with torch.no_grad():
            features = encoder(**inputs).last_hidden_state[0]
            probabilities, ids = whole.lm_head(whole.proj(features)).softmax(-1).topk(3)
        assert [(p["row"], p["column"]) for p in found["patches"]] == [
            (r, c) for r in range(rows) for c in range(columns)
        ]
        read = [[token["id"] for token in patch["tokens"]] for patch in found["patches"]]
        assert read == ids.tolist()
        shown = torch.tensor([[token["probability"] for token in patch["tokens"]] for patch in found["patches"]])
        torch.testing.assert_close(shown, probabilities, atol=2e-6, rtol=0)
        assert all(token["text"] for patch in found["patches"] for token in patch["tokens"])
        picture = Image.open(file.with_suffix(".png"))
        assert picture.size == (columns * 104, rows * 104)
        # Letters of the likeliest token are yellow.
        assert {(255, 224, 102)} <= {colour for _, colour in picture.getcolors(1 << 24) or ()}


def test_only_readouts_are_replaced(tool: Tool, checkpoints: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    words = [photos, "--load", checkpoints["1"], "--output", tmp_path / "readout"]
    # Labelling tools also write pairs of a picture and a JSON file.
    (tmp_path / "readout").mkdir()
    for name in ("00000-cat.png", "00000-cat.json"):
        (tmp_path / "readout" / name).write_text("labels")
    line = tool(main, *words, "--overwrite", status=2)
    assert "no index.json of readouts" in line
    (tmp_path / "readout" / "index.json").write_text('{"kind": "genlip patch readouts", "files": ["00000-cat.png"]}')
    assert "(00000-cat.json)" in tool(main, *words, "--overwrite", status=2)
    (tmp_path / "readout" / "00000-cat.json").unlink()
    tool(main, *words, "--overwrite", "--limit", 1, status=1)  # the first file is not an image
    tool(main, *words, "--overwrite", "--limit", 3)
    assert not (tmp_path / "readout" / "00000-cat.png").exists()
