"""GenLIP models of OpenCLIP: both ways bit for bit, and refusals by name.

Tests against OpenCLIP's own class skip themselves where it does not import: open_clip_torch 3.3.0 has no GenLIP.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genlip_megatron.checkpoint import loading, manifest
from genlip_megatron.convert import openclip
from genlip_megatron.convert.megatron_source import MegatronSource
from genlip_megatron.convert.verify import compare_openclip
from genlip_megatron.hf.shared_genlip import image_settings
from genlip_megatron.optional import need_open_clip
from genlip_megatron.testing.runs import tiny_config
from tests.convert.weights import differing, random_weights, read_source, write_released
from tools.convert_checkpoint import main

CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


def require_open_clip() -> None:
    try:
        need_open_clip()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def convert(tool: Callable[..., str]) -> Callable[..., str]:
    return partial(tool, main)


@pytest.fixture(scope="module")
def weights(demo_data: Path) -> dict[str, Tensor]:
    return random_weights(tiny_config(demo_data).model)


@pytest.fixture(scope="module")
def started(weights: dict[str, Tensor], demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of weights only."""
    root, config = tmp_path_factory.mktemp("started"), tiny_config(demo_data)
    from genlip_megatron.convert.megatron_target import write_checkpoint
    from genlip_megatron.convert.safetensors_file import SafetensorsSource
    from genlip_megatron.tokenizer import load_tokenizer

    source = SafetensorsSource(write_released(root / "released", weights), config.model)
    (root / "run").mkdir()
    fingerprint = load_tokenizer(config.data.tokenizer, config.model.vocab_size).fingerprint
    return write_checkpoint(root / "run", source, config, None, fingerprint)


@pytest.fixture
def folder(started: Path, convert: Callable[..., str], tmp_path: Path) -> Path:
    """The checkpoint as OpenCLIP's folder."""
    convert("to-openclip", started, "--output", tmp_path / "openclip")
    return tmp_path / "openclip"


def imported(place: Path) -> dict[str, Tensor]:
    """The weights in a folder of checkpoints that ``to-megatron`` wrote."""
    checkpoint = place / "iter_0000000"
    return read_source(MegatronSource(checkpoint, manifest.read(checkpoint), loading.read_config(checkpoint).model))


def set_field(section: str, name: str, value: Any, place: Path) -> None:
    fields = json.loads((place / openclip.CONFIG).read_text())
    (fields if section == "preprocess_cfg" else fields["model_cfg"])[section][name] = value
    (place / openclip.CONFIG).write_text(json.dumps(fields))


def rewrite(place: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors")


def test_weights_and_settings_come_back_bit_for_bit(
    folder: Path, started: Path, weights: dict[str, Tensor], convert: Callable[..., str], tmp_path: Path
) -> None:
    convert("to-megatron", folder, "--output", tmp_path / "back")
    assert differing(imported(tmp_path / "back"), weights) == []
    ours, back = (loading.read_config(place) for place in (started, tmp_path / "back" / "iter_0000000"))
    assert back.model == ours.model
    for name in ("image_mode", "image_size", "fixed_resize", "min_pixels", "max_pixels", "prompt"):
        assert getattr(back.data, name) == getattr(ours.data, name)


def test_patches_are_rows_of_channels_and_the_encoder_is_stored_twice(folder: Path, weights: dict[str, Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    matrix, kernel = tensors["patch_embed.proj.weight"], weights["vision_embeddings.patch_embedding.weight"]
    assert matrix.shape == (32, 768) and matrix[5, (2 * 16 + 7) * 3 + 1] == kernel[5, 1, 2, 7]
    encoder = [name for name in tensors if name.startswith(("patch_embed.", "trunk."))]
    assert len(encoder) > 20 and all(torch.equal(tensors[name], tensors[f"visual.{name}"]) for name in encoder)


def test_copies_that_differ_are_refused(folder: Path, convert: Callable[..., str], tmp_path: Path) -> None:
    rewrite(folder, lambda tensors: tensors["visual.trunk.ln_post.bias"].add_(1))
    line = convert("to-megatron", folder, "--output", tmp_path / "back", status=2)
    assert "visual.trunk.ln_post.bias: not equal to the same tensors without visual." in line


def test_training_checkpoints_are_read(
    folder: Path, weights: dict[str, Tensor], convert: Callable[..., str], tmp_path: Path
) -> None:
    """Saved by torch with an optimizer, and from a wrapped model; the configuration is a file elsewhere."""
    state = {f"module._orig_mod.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    file = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, file)
    words = (file, "--tokenizer", folder / "tokenizer.json", "--output", tmp_path / "back")
    assert "Name OpenCLIP's JSON file of the model with --openclip-config" in convert("to-megatron", *words, status=2)
    convert("to-megatron", *words, "--openclip-config", folder / openclip.CONFIG)
    assert differing(imported(tmp_path / "back"), weights) == []
    torch.save({"state_dict": state, "args": Fraction(1)}, file)
    words = (*words, "--openclip-config", folder / openclip.CONFIG, "--overwrite")
    assert "not readable as weights of OpenCLIP: it holds objects besides" in convert("to-megatron", *words, status=2)
    torch.save({"state_dict": 5}, file)
    assert "holds no state_dict of tensors" in convert("to-megatron", *words, status=2)
    for content in (b"", b"<html>", file.read_bytes()[:100]):
        file.write_bytes(content)
        assert "OpenCLIP: damaged, or not written by torch.save" in convert("to-megatron", *words, status=2)
    file.unlink()
    assert "epoch_3.pt: no such folder or file" in convert("to-megatron", *words, status=2)


def test_missing_biases_are_zero(
    folder: Path, weights: dict[str, Tensor], convert: Callable[..., str], tmp_path: Path
) -> None:
    for section, name in (("genlip_cfg", "attention_bias"), ("genlip_cfg", "mlp_bias"), ("vision_cfg", "proj_bias")):
        set_field(section, name, False, folder)
    ends = tuple(f"{part}.bias" for part in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "gate_fc", "fc2"))

    def absent(name: str) -> bool:
        return name.endswith("patch_embed.proj.bias") or (".layers." in name and name.endswith(ends))

    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if absent(name)])
    convert("to-megatron", folder, "--output", tmp_path / "back")
    ours = {name for name in weights if absent(name.replace("vision_embeddings.patch_embedding", "patch_embed.proj"))}
    expected = {name: torch.zeros_like(tensor) if name in ours else tensor for name, tensor in weights.items()}
    assert len(ours) == 1 + 7 * 4 and differing(imported(tmp_path / "back"), expected) == []


def test_another_mean_is_folded_into_the_patch_embedding(
    folder: Path, weights: dict[str, Tensor], convert: Callable[..., str], tmp_path: Path
) -> None:
    for name, value in CLIP.items():
        set_field("preprocess_cfg", name, value, folder)
    convert("to-megatron", folder, "--output", tmp_path / "back")
    found = imported(tmp_path / "back")
    patches = [f"vision_embeddings.patch_embedding.{part}" for part in ("weight", "bias")]
    assert differing(found, weights) == sorted(patches)
    levels = torch.rand(5, 3, 16, 16, dtype=torch.float64)
    mean, std = (torch.tensor(CLIP[name], dtype=torch.float64).view(3, 1, 1) for name in ("mean", "std"))
    outputs = [
        torch.nn.functional.conv2d(pixels, *(tensors[name].double() for name in patches)).flatten()
        for pixels, tensors in (((levels - mean) / std, weights), ((levels - 0.5) / 0.5, found))
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6 * outputs[0].abs().max().item())


def test_the_default_of_open_clip_is_the_mean_of_clip(folder: Path) -> None:
    fields = json.loads((folder / openclip.CONFIG).read_text())
    (folder / openclip.CONFIG).write_text(json.dumps(fields["model_cfg"]))
    described = openclip.read_description(folder / openclip.CONFIG)
    assert list(described.mean) == CLIP["mean"] and list(described.std) == CLIP["std"]
    assert described.images == image_settings("native", max_pixels=128 * 128)


@pytest.mark.parametrize(
    ("section", "name", "value", "part"),
    [
        ("genlip_cfg", "norm_type", "rmsnorm", "only 'layernorm'"),
        ("genlip_cfg", "qk_norm", True, "only False"),
        ("genlip_cfg", "use_swiglu_ffn", False, "only True"),
        ("genlip_cfg", "hidden_act", "gelu", "only 'silu'"),
        ("genlip_cfg", "mrope_interleaved", False, "only True"),
        ("vision_cfg", "pre_norm", True, "only False"),
        ("vision_cfg", "input_norm", True, "only False"),
        ("vision_cfg", "patch_size", 14, "only 16"),
        ("text_cfg", "pre_norm", True, "only False"),
        ("genlip_cfg", "sink_tokens", 4, "unknown"),
        ("genlip_cfg", "width", "32", "must be a whole number"),
        ("genlip_cfg", "mrope_section", [2, 1], "must be three whole numbers"),
        ("genlip_cfg", "depth", 5, "its tensors do not match the model: missing: trunk.layers.4."),
        ("preprocess_cfg", "std", [0.5, 0, 0.5], "expected three finite numbers"),
        ("preprocess_cfg", "mean", [0.5, float("nan"), 0.5], "expected three finite numbers"),
        ("genlip_cfg", "ls_init_value", "x", "must be a number"),
        ("genlip_cfg", "gated_attention", "x", "must be true or false"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    section: str, name: str, value: Any, part: str, folder: Path, convert: Callable[..., str], tmp_path: Path
) -> None:
    set_field(section, name, value, folder)
    line = convert("to-megatron", folder, "--output", tmp_path / "no", status=2)
    assert part in line and (f"{section}.{name} = {value!r}" in line or "tensors" in line) and str(folder) in line


def test_flags_of_the_other_format_are_refused(
    folder: Path, started: Path, convert: Callable[..., str], tmp_path: Path
) -> None:
    line = convert("to-megatron", folder, "--output", tmp_path / "no", "--num-attention-heads", "2", status=2)
    assert "--num-attention-heads: OpenCLIP's configuration has the heads" in line
    words = ("--output", tmp_path / "no", "--openclip-config", folder / openclip.CONFIG)
    assert "is no checkpoint of OpenCLIP" in convert("to-megatron", started, *words, status=2)


def test_an_image_processor_of_others_beside_the_weights_is_not_read(
    folder: Path, convert: Callable[..., str], tmp_path: Path
) -> None:
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    convert("to-megatron", folder, "--output", tmp_path / "back")


def test_heads_that_contradict_the_sections_are_refused(
    folder: Path, convert: Callable[..., str], tmp_path: Path
) -> None:
    set_field("genlip_cfg", "num_heads", 2, folder)
    line = convert("to-megatron", folder, "--output", tmp_path / "no", status=2)
    assert "num_attention_heads = 2: half a head has 8 channels" in line


def test_only_its_own_output_is_replaced(
    folder: Path, started: Path, convert: Callable[..., str], tmp_path: Path
) -> None:
    words = ("to-openclip", started, "--output")
    assert "not empty" in convert(*words, folder, status=2)
    convert(*words, folder, "--overwrite", "--dtype", "bf16")
    assert load_file(folder / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    (folder / "mine").write_text("mine")
    assert "something else (mine)" in convert(*words, folder, "--overwrite", status=2)
    assert "holds something else" in convert("to-hf", started, "--output", folder, "--overwrite", status=2)


def test_verify_without_open_clip_writes_nothing(
    folder: Path, started: Path, convert: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.naflex_genlip_model", None)
    for words in (("to-openclip", started), ("to-megatron", folder)):
        line = convert(*words, "--output", tmp_path / "no", "--verify", status=2)
        assert "OpenCLIP with GenLIP does not import" in line


def test_open_clip_computes_the_same_logits(
    folder: Path, started: Path, convert: Callable[..., str], tmp_path: Path
) -> None:
    require_open_clip()
    said = convert("to-openclip", started, "--output", folder, "--overwrite", "--verify", "--dtype", "bf16")
    assert "logits: largest difference" in said and "within the tolerance of 1e-04" in said
    convert("to-openclip", started, "--output", folder, "--overwrite")
    for name, value in CLIP.items():
        set_field("preprocess_cfg", name, value, folder)
    said = convert("to-megatron", folder, "--output", tmp_path / "back", "--verify")
    assert "within the tolerance of 1e-04" in said
    described = openclip.read_description(folder / openclip.CONFIG)
    place = tmp_path / "back" / "iter_0000000"
    rewrite(folder, lambda tensors: [tensors[f"{part}patch_embed.proj.bias"][0].add_(1) for part in ("", "visual.")])
    (found,) = compare_openclip(place, loading.read_config(place), described, folder / "model.safetensors")
    assert not found.small
