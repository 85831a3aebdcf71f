"""Every family of encoders that ``transformers`` writes opens, and gives its own features without prefix tokens."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")

from genlip_megatron.encoders.hugging_face import naflex_size  # noqa: E402
from genlip_megatron.encoders.interface import Encoder, check_equal_grids  # noqa: E402
from genlip_megatron.encoders.registry import open_encoder  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
CLIP_TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# {family: (configuration, prefix tokens, the final norm covers the patches)}
FAMILIES: dict[str, tuple[Any, int, bool]] = {
    "clip": (transformers.CLIPVisionConfig(**SIZES), 1, False),
    "clip, two towers": (
        transformers.CLIPConfig(vision_config=SIZES, text_config={**CLIP_TEXT, "vocab_size": 99}, projection_dim=8),
        1,
        False,
    ),
    "siglip": (transformers.SiglipVisionConfig(**SIZES), 0, True),
    "siglip2": (transformers.Siglip2VisionConfig(**{**SIZES, "num_patches": 16}), 0, True),
    "aimv2": (transformers.Aimv2VisionConfig(**SIZES), 0, True),
    "mlcd": (transformers.MLCDVisionConfig(**SIZES, num_key_value_groups=1), 1, False),
    "dinov2": (transformers.Dinov2Config(**SIZES), 1, True),
    "dinov2_with_registers": (transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4), 5, True),
    "dinov3_vit": (transformers.DINOv3ViTConfig(**SIZES, num_register_tokens=4), 5, True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{family: a folder with random weights}."""
    root = tmp_path_factory.mktemp("families")
    torch.manual_seed(0)
    for family, (config, _, _) in FAMILIES.items():
        transformers.AutoModel.from_config(config).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


def picture(width: int = 90, height: int = 70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_models_own(family: str, folders: dict[str, Path]) -> None:
    _, prefix, normed = FAMILIES[family]
    pixels = torch.randn(2, 3, 64, 64)
    model = transformers.AutoModel.from_pretrained(folders[family]).eval()
    model = getattr(model, "vision_model", model)
    if family == "siglip2":  # patches row by row, each as (row, column, channel)
        cut = pixels.reshape(2, 3, 4, 16, 4, 16).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 768)
        inputs = {"pixel_values": cut, "pixel_attention_mask": torch.ones(2, 16), "spatial_shapes": [(4, 4), (4, 4)]}
        inputs["spatial_shapes"] = torch.tensor(inputs["spatial_shapes"])
    else:
        inputs = {"pixel_values": pixels}
    with torch.inference_mode():
        output = model(**inputs, output_hidden_states=True)
        found = {
            layer: open_encoder(str(folders[family]), layer=layer).encode(list(pixels))
            for layer in ("after_norm", "last_block", "-2")
        }
    for row in range(2):
        features = found["after_norm"][row]
        assert features.grid == (4, 4) and features.prefix.shape == (prefix, 32)
        torch.testing.assert_close(torch.cat((features.prefix, features.patches)), output.last_hidden_state[row])
        second = torch.cat((found["-2"][row].prefix, found["-2"][row].patches))
        torch.testing.assert_close(second, output.hidden_states[-2][row])
        last = torch.cat((found["last_block"][row].prefix, found["last_block"][row].patches))
        assert torch.allclose(last, output.last_hidden_state[row], atol=1e-5) is not normed


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_batches(family: str, folders: dict[str, Path]) -> None:
    encoder = open_encoder(f"hf:{folders[family]}")
    small, large = torch.randn(3, 64, 64), torch.randn(3, 96, 64)
    if family == "aimv2":
        with pytest.raises(ValueError, match="96 x 64 pixels, but this AIMv2 has learned positions only for 64 x 64"):
            encoder.encode([large])
        return
    together = encoder.encode([small, large, small + 1])
    assert [one.grid for one in together] == [(4, 4), (6, 4), (4, 4)]
    for image, features in zip((small, large, small + 1), together, strict=True):
        torch.testing.assert_close(encoder.encode([image])[0].patches, features.patches, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="70 x 64 pixels has no whole number of 16 x 16 patches"):
        encoder.encode([torch.randn(3, 70, 64)])


def test_pixels_are_prepared_as_the_folder_says(folders: dict[str, Path]) -> None:
    (folders["dinov2"] / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    prepared = open_encoder(str(folders["dinov2"])).preprocess(picture())
    expected = np.asarray(picture().resize((64, 64), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(prepared.numpy(), expected, atol=1e-6)
    native = open_encoder(str(folders["siglip2"])).preprocess(picture(90, 40))
    assert native.shape == (3, 48, 80)  # at most 16 patches


@pytest.mark.parametrize("seed", range(5))
def test_naflex_sizes_are_those_of_transformers(seed: int) -> None:
    try:
        module = importlib.import_module("transformers.models.siglip2.image_processing_pil_siglip2")
    except ImportError:  # older versions, whose only module needs no torchvision
        module = pytest.importorskip("transformers.models.siglip2.image_processing_siglip2", exc_type=ImportError)
    rng = np.random.default_rng(seed)
    for width, height, most in zip(*rng.integers(1, (2000, 2000, 1024), (40, 3)).T.tolist(), strict=True):
        theirs = module.get_image_size_for_max_num_patches(height, width, 16, most)
        ours = naflex_size(width, height, 16, most)
        # Their search stops 1e-5 below the largest scale, so it can miss it by one patch.
        assert max(abs(ours[0] - theirs[1]), abs(ours[1] - theirs[0])) <= 16
        assert ours[0] * ours[1] <= max(most, 1) * 256


def test_fingerprints_tell_all_that_decides_the_features(folders: dict[str, Path]) -> None:
    def fingerprint(name: str, **options: Any) -> str:
        return open_encoder(name, **options).fingerprint

    one = str(folders["siglip"])
    others = [
        fingerprint(one, layer="-2"),
        fingerprint(one, layer="last_block"),
        fingerprint(f"random:{one}"),
        fingerprint(str(folders["clip"])),
        fingerprint("pixels"),
        fingerprint("colour"),
    ]
    assert fingerprint(one) == fingerprint(f"hf:{one}") and len({fingerprint(one), *others}) == 7
    assert fingerprint(f"random:{one}") == fingerprint(f"random:{one}")
    (folders["siglip"] / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    assert fingerprint(one) not in others


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("nowhere", "after_norm", "--encoder nowhere: no such folder. Name a folder, or one of the kinds"),
        ("hf:some/name", "after_norm", "cannot be opened .*Without a network, name a folder"),
        ("{bert}", "after_norm", "model_type 'bert'. Known are clip, siglip"),
        ("{siglip}", "-4", "--layer -4: encoder .* has 3 blocks. Allowed are after_norm, last_block, and -1 .* to -3"),
        ("{siglip}", "middle", "--layer middle: encoder"),
        ("{short}", "after_norm", "its weights lack .*layer"),
        ("pixels", "-2", "this baseline has no layers"),
        ("efficientnet:b7", "after_norm", "unknown. Allowed are efficientnet:lite0"),
        ("timm:vit", "after_norm", "timm (does not import|cannot open it)"),
        ("open_clip:ViT", "after_norm", "open_clip (does not import|cannot open it)"),
    ],
)
def test_what_cannot_be_opened_is_one_line(
    name: str, layer: str, message: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "bert").mkdir()
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    shorter = transformers.SiglipVisionConfig(**{**SIZES, "num_hidden_layers": 1})
    transformers.AutoModel.from_config(shorter).save_pretrained(tmp_path / "short")
    transformers.SiglipVisionConfig(**SIZES).save_pretrained(tmp_path / "short")
    places = {"bert": tmp_path / "bert", "short": tmp_path / "short", "siglip": folders["siglip"]}
    with pytest.raises(ValueError, match=message) as error:
        open_encoder(name.format(**places), layer=layer)
    assert "\n" not in str(error.value)


def test_unequal_grids_are_refused() -> None:
    encoders: list[Encoder] = [open_encoder("pixels"), open_encoder("colour")]
    check_equal_grids(encoders, [64, 64], allow_unequal=False)
    check_equal_grids(encoders, [64, 96], allow_unequal=True)
    with pytest.raises(ValueError, match="unequal grids of patches: pixels 4x4, colour 6x6.*--allow-unequal"):
        check_equal_grids(encoders, [64, 96], allow_unequal=False)
