"""tools/extract_features.py: features equal the model's for any packing, and the index finds them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from tools.extract_features import main
from tools.patch_readout import main as patch_readout

Tool = Callable[..., str]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(index, name -> features)."""
    index = json.loads((folder / "index.json").read_text())
    found = {}
    for entry in index["images"]:
        rows = slice(entry["start"], entry["start"] + entry["shape"][0])
        if entry["file"].endswith(".npy"):
            values = np.load(folder / entry["file"], mmap_mode="r")[rows]
        else:
            with safe_open(folder / entry["file"], "np") as file:
                values = file.get_slice("features")[rows]
        assert list(values.shape) == entry["shape"]
        found[Path(entry["path"]).name if "path" in entry else entry["key"]] = values
    return index, found


def test_features_are_those_of_plain_transformers(
    tool: Tool, checkpoints: dict[str, Path], exported: Path, photos: Path, tmp_path: Path
) -> None:
    tool(main, photos, "--load", checkpoints["TP2"], "--output", tmp_path / "features")
    index, found = read(tmp_path / "features")
    model = AutoModel.from_pretrained(exported, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(exported, trust_remote_code=True)
    assert len(found) == 5 and [Path(entry["path"]).name for entry in index["failed"]] == ["broken.jpg", "short.jpg"]
    for entry in index["images"]:
        inputs = processor(Image.open(entry["path"]), return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state[0]
        assert inputs["image_grid_hw"].tolist() == [entry["grid"]]
        # Within float32's rounding of values of about 1.
        torch.testing.assert_close(torch.from_numpy(found[Path(entry["path"]).name]), expected, atol=1e-5, rtol=0)


def test_packs_formats_and_pooling_change_nothing(
    tool: Tool, checkpoints: dict[str, Path], demo_data: Path, photos: Path, tmp_path: Path
) -> None:
    words = [demo_data / "val-00000.tar", photos, "--load", checkpoints["1"], "--output"]
    tool(main, *words, tmp_path / "packed")
    tool(main, *words, tmp_path / "single", "--max-patches", 1, "--format", "npy", "--max-file-size", 1e-5)
    tool(main, *words, tmp_path / "mean", "--pool", "mean", "--max-patches", 200)
    (_, packed), (index, single), (_, mean) = (read(tmp_path / name) for name in ("packed", "single", "mean"))
    assert list(packed) == list(single) == list(mean) and len(packed) == 29
    assert len({entry["file"] for entry in index["images"]}) > 3
    for name, values in packed.items():
        np.testing.assert_allclose(single[name], values, atol=1e-5, rtol=0)
        np.testing.assert_allclose(mean[name], values.mean(0, keepdims=True), atol=1e-5, rtol=0)


def test_other_sizes_and_types(tool: Tool, exported: Path, photos: Path, tmp_path: Path) -> None:
    words = [photos, "--load", exported, "--overwrite", "--output", tmp_path / "features"]
    tool(main, *words, "--image-mode", "fixed", "--image-size", 48, "--feature-dtype", "fp16")
    index, found = read(tmp_path / "features")
    assert all(values.shape == (9, 32) and values.dtype == np.float16 for values in found.values())
    assert index["dtype"] == "float16" and index["images_resized"]["size"] == {"height": 48, "width": 48}
    tool(main, *words, "--max-pixels", 4096, "--limit", 2)  # replaces the earlier folder
    (tmp_path / "features" / "features-notes.txt").write_text("mine")
    assert "(features-notes.txt)" in tool(main, *words, status=2)
    (tmp_path / "features" / "features-notes.txt").unlink()
    index, _ = read(tmp_path / "features")
    # 4096 pixels are 16 patches; the first of the two files is not an image.
    assert [entry["grid"][0] * entry["grid"][1] <= 16 for entry in index["images"]] == [True]


def test_images_with_nan_features_count_as_failed(
    tool: Tool, exported: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genlip_megatron.infer import features

    def infinite(loaded: Any, images: Any, mean: bool) -> list[torch.Tensor]:
        return [rows * torch.inf if "image2" in image.name["path"] else rows
                for image, rows in zip(images, compute(loaded, images, mean), strict=True)]  # fmt: skip

    compute = features.features
    words = [photos, "--load", exported, "--output", tmp_path / "features"]
    with monkeypatch.context() as patched:
        patched.setattr(features, "features", infinite)
        tool(main, *words)
    index, found = read(tmp_path / "features")
    assert len(found) == 4 and all(np.isfinite(values).all() for values in found.values())
    assert [Path(entry["path"]).name for entry in index["failed"]] == ["broken.jpg", "image2.webp", "short.jpg"]
    assert index["failed"][1]["error"] == "its features are not all finite numbers"
    # With NaN in the weights every readout fails.
    harmed = Path(shutil.copytree(exported, tmp_path / "harmed"))
    weights = load_file(harmed / "model.safetensors")
    save_file({**weights, "ln_post.bias": weights["ln_post.bias"] * torch.nan}, harmed / "model.safetensors")
    words = [photos / "image0.png", "--load", harmed, "--output", tmp_path / "readout"]
    tool(patch_readout, *words, status=1)
    assert [file.name for file in (tmp_path / "readout").iterdir()] == ["index.json"]
