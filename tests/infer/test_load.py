"""A model is loaded as stored: no tensor is silently dropped, rounded or left random."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from genlip_megatron.convert.conversion import folder_images, recorded_run
from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel
from genlip_megatron.hf.shared_genlip import image_settings
from genlip_megatron.infer.load import load
from tests.hf.models import export, random_weights, tiny
from tools.extract_features import main as extract_features


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A folder with only a vision encoder of two layers."""
    from genlip_megatron.config import DataConfig
    from genlip_megatron.convert.hf_folder import write_side_files
    from genlip_megatron.model.state_dict import in_encoder

    folder = tmp_path / "encoder"
    write_side_files(folder, tiny(), DataConfig(), None, "float32", encoder_only=True)
    weights = {name: tensor for name, tensor in random_weights(tiny()).items() if in_encoder(name)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def set_fields(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def set_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    weights = {**load_file(folder / "model.safetensors"), name: tensor}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "part"),
    [
        (lambda place: set_fields(place, num_hidden_layers=1), "visual.layers.1."),
        (lambda place: set_fields(place, num_hidden_layers=3), "no visual.layers.2."),
        (lambda place: set_tensor(place, "extra", torch.zeros(1)), "extra, which GenLIPVisionModel"),
        (
            # Before version 5 transformers does not report the shapes.
            lambda place: set_tensor(place, "ln_post.bias", torch.zeros(5)),
            r"ln_post.bias (is \[5\], \[48\]|has another shape than) expected",
        ),
        (lambda place: (place / "config.json").unlink(), "no config.json"),
        (lambda place: set_fields(place, hidden_size="big"), "hidden_size = 'big'"),
    ],
)
def test_an_encoder_whose_tensors_are_not_the_models_is_refused(
    harm: Callable[[Path], Any], part: str, encoder: Path, photos: Path, tool: Callable[..., str], tmp_path: Path
) -> None:
    harm(encoder)
    words = [photos, "--load", encoder, "--output", tmp_path / "features", "--device", "cpu"]
    line = tool(extract_features, *words, status=2)
    assert str(encoder) in line and re.search(part, line)


def test_an_encoder_is_loaded_from_a_folder_with_text_parts(encoder: Path) -> None:
    set_tensor(encoder, "lm_head.weight", torch.zeros(3, 4))
    assert load(encoder, print, encoder_only=True).model.config.num_hidden_layers == 2
    set_tensor(encoder, "ln_post.bias", torch.zeros(5))
    assert GenLIPVisionModel.from_pretrained(encoder, ignore_mismatched_sizes=True).ln_post.bias.shape == (48,)


def test_the_image_rule_of_a_folder_saved_again_by_transformers(
    exported_native: Path, tmp_path: Path, demo_data: Path
) -> None:
    """Version 5 has the image processor inside ``processor_config.json``."""
    processor = transformers.AutoProcessor.from_pretrained(exported_native, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported_native, trust_remote_code=True)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "again")
    images = load(tmp_path / "again", print).image_processor
    assert (images.image_mode, images.min_pixels, images.max_pixels) == ("native", 512, 16384)
    recorded = recorded_run(tmp_path / "again", tiny(), demo_data / "tokenizer.model", "fp32", print).data
    assert (recorded.image_mode, recorded.min_pixels, recorded.max_pixels) == ("native", 512, 16384)


def test_missing_image_settings_are_reported(exported_native: Path, demo_data: Path) -> None:
    said: list[str] = []
    assert load(exported_native, said.append).image_processor.image_mode == "native" and not said
    (exported_native / "preprocessor_config.json").unlink()
    assert load(exported_native, said.append).image_processor.size == {"height": 224, "width": 224}
    recorded_run(exported_native, tiny(), demo_data / "tokenizer.model", "fp32", said.append)
    line = f"no image settings in {exported_native}: using images of 224 x 224 pixels (fixed, squash)"
    assert said == [line, line]


VIT, CLIP = {"image_processor_type": "ViTImageProcessor"}, {"image_processor_type": "CLIPImageProcessorFast"}
STEPS: dict[str, Any] = {"resample": 2, "image_mean": [0.5] * 3, "image_std": 0.5, "rescale_factor": 1 / 255}
AUTHORS = {
    **STEPS,
    "min_pixels": 4096,
    "max_pixels": 262144,
    "patch_size": 16,
    "merge_size": 1,
    "temporal_patch_size": 1,
}
AREAS = {"shortest_edge": 4096, "longest_edge": 1048576}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({**AUTHORS, "size": AREAS}, image_settings("native")),
        (
            {name: value for name, value in AUTHORS.items() if "pixels" not in name} | {"size": AREAS},
            image_settings("native", max_pixels=1048576),
        ),
        ({**STEPS, **VIT, "size": {"height": 384, "width": 384}, "do_convert_rgb": None}, image_settings(size=384)),
        ({**STEPS, **VIT, "size": 384, "do_pad": False, "crop_size": 224}, image_settings(size=384)),
        ({**STEPS, **CLIP, "size": 224}, image_settings(fixed_resize="resize-center-crop")),
        ({**STEPS, **CLIP, "size": {"height": 64, "width": 64}, "do_center_crop": False}, image_settings(size=64)),
        (
            {
                **STEPS,
                **CLIP,
                "size": {"shortest_edge": 64},
                "do_center_crop": True,
                "crop_size": {"height": 64, "width": 64},
            },
            image_settings(size=64, fixed_resize="resize-center-crop"),
        ),
    ],
)
def test_image_settings_of_others_are_mapped(
    fields: dict[str, Any], expected: dict[str, Any], exported_native: Path
) -> None:
    (exported_native / "preprocessor_config.json").write_text(json.dumps(fields))
    assert folder_images(exported_native, pytest.fail) == expected


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({**AUTHORS, "resample": 3}, "resample = 3: this project has only 2"),
        ({**AUTHORS, "image_mean": [0.48, 0.46, 0.41]}, r"image_mean = \[0.48, 0.46, 0.41\]"),
        ({**AUTHORS, "patch_size": 14}, "patch_size = 14"),
        ({**AUTHORS, "merge_size": 2}, "merge_size = 2"),
        ({**STEPS, "max_pixels": 4096}, "patch_size = None: this project has only 16"),
        ({**STEPS, **VIT, "do_pad": True, "size": 64}, "do_pad = True"),
        ({**STEPS, **VIT, "crop_pct": 0.875, "size": 64}, "crop_pct = 0.875"),
        ({**STEPS, **VIT, "do_center_crop": True, "size": 64}, "do_center_crop = True: ViTImageProcessor has no such"),
        ({**STEPS, **VIT, "max_num_patches": 256}, "max_num_patches = 256"),
        ({**STEPS, "size": 64}, "image_processor_type = None: this project knows ViTImageProcessor"),
        ({**STEPS, "image_processor_type": "DonutImageProcessor", "size": 64}, "image_processor_type = 'Donut"),
        ({**STEPS, **CLIP, "size": 64, "do_center_crop": False}, "size = 64: without a crop"),
        ({**STEPS, **CLIP, "size": 64}, "crop_size = 224"),
        ({**STEPS, **CLIP, "size": {"shortest_edge": 64}, "do_center_crop": False}, "size = {'shortest_edge': 64}"),
        ({**STEPS, **CLIP, "size": {"shortest_edge": 72}, "crop_size": 64}, "crop_size = 64"),
        ({"image_processor_type": "ViTImageProcessor", "size": 384}, "resample is missing"),
        ({"image_mode": "fixed", "size": 64, "image_std": 0.3}, "image_std = 0.3"),
    ],
)
def test_image_settings_that_this_project_lacks_are_refused(
    fields: dict[str, Any], part: str, exported_native: Path
) -> None:
    file = exported_native / "preprocessor_config.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"{file}: {part}"):
        load(exported_native, print)


def test_heads_that_contradict_the_rotary_sections_are_reported(exported_native: Path) -> None:
    file, said = exported_native / "config.json", list[str]()
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 2}))
    load(exported_native, said.append)
    assert "half of one of num_attention_heads = 2 heads has 12 channels" in said[0]


def test_a_size_that_is_one_number_is_a_square(exported_native: Path) -> None:
    file = exported_native / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mode": "fixed", "size": 64}))
    processor = transformers.AutoImageProcessor.from_pretrained(exported_native, trust_remote_code=True)
    assert processor.size == {"height": 64, "width": 64}


def test_a_prompt_that_is_not_text_is_refused(exported_native: Path, demo_data: Path) -> None:
    file = exported_native / "processor_config.json"
    file.write_text('{"prompt": 5}')
    for read in (
        lambda: load(exported_native, print),
        lambda: recorded_run(exported_native, tiny(), demo_data / "tokenizer.model", "fp32", print),
    ):
        with pytest.raises(ValueError, match=f"{file}: prompt = 5: expected a string"):
            read()


@pytest.fixture
def exported_native(tmp_path: Path, demo_data: Path) -> Path:
    """A folder for images of native sizes."""
    return export(
        tmp_path / "native", demo_data / "tokenizer.model", image_mode="native", min_pixels=512, max_pixels=16384
    )


def test_a_value_beyond_fp16_is_refused(encoder: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    load(encoder, print, encoder_only=True, dtype="fp16")
    set_tensor(encoder, "ln_post.bias", torch.full((48,), 7e4))
    with pytest.raises(ValueError, match="ln_post.bias: a value of 7e"):
        load(encoder, print, encoder_only=True, dtype="fp16")
    assert load(encoder, print, encoder_only=True, dtype="bf16").model.dtype == torch.bfloat16
    loaded = load(checkpoints["1"], print, encoder_only=True, dtype="fp16")
    assert loaded.model.dtype == torch.float16


def test_tools_without_transformers_say_what_to_install(
    tool: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.caption import main as caption
    from tools.patch_readout import main as patch_readout

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for main in (caption, extract_features, patch_readout):
        line = tool(main, tmp_path, "--load", tmp_path, "--output", tmp_path / "new", status=2)
        assert "pip install '.[hf]' in the checkout" in line


def test_a_missing_head_count_names_only_existing_flags(exported_native: Path) -> None:
    set_fields(exported_native, num_attention_heads=None)
    with pytest.raises(ValueError, match="num_attention_heads is missing") as raised:
        load(exported_native, print)
    assert "--num" not in str(raised.value) and "config.json" in str(raised.value)
