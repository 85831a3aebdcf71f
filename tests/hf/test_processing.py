"""Exported processors give the pixels and tokens of training, and name invalid input."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor

from genlip_megatron.config import DEFAULT_PROMPT
from genlip_megatron.data.decode import CpuDecoder, ImageTask
from genlip_megatron.data.resize import native_size
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor, to_rgb
from genlip_megatron.hf.modeling_genlip import pack_images, split_images
from genlip_megatron.tokenizer import load_tokenizer
from tests.data.shards import image, interlaced, rotated, sixteen_bit
from tests.hf.models import export

QWEN = Path(__file__).parents[3] / "shared" / "data" / "qwen3-tokenizer" / "tokenizer.json"


def transparent(mode: str) -> bytes:
    out = io.BytesIO()
    picture = Image.linear_gradient("L").resize((70, 50)).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").rotate(90).resize((70, 50)))
    picture.convert(mode).save(out, "PNG", **({"transparency": 3} if mode == "P" else {}))
    return out.getvalue()


PICTURES = {
    "wide": image(size=(333, 90)),
    "tall": image(size=(60, 700), quality=60),
    "large": image(size=(900, 650)),
    "exact": image(size=(224, 224)),
    "grey": image(mode="L", size=(100, 81)),
    "cmyk": image(mode="CMYK", size=(120, 100)),
    "webp": image("WEBP", size=(99, 64)),
    **{f"turned-{i}": rotated(i) for i in range(1, 9)},
    "sixteen-bit": sixteen_bit(),
    "interlaced": interlaced(),
    "rgba": transparent("RGBA"),
    "la": transparent("LA"),
    "palette": transparent("P"),
}
MODES: dict[str, dict[str, Any]] = {
    "squash": {},
    "crop": {"size": {"height": 96, "width": 160}, "fixed_resize": "resize-center-crop"},
    "native": {"image_mode": "native"},
    "native-small": {"image_mode": "native", "min_pixels": 1024, "max_pixels": 16384},
}


def training_pixels(content: bytes, settings: dict[str, Any]) -> tuple[Tensor, tuple[int, int]]:
    """(normalised patches, their grid) by the plain reference of training."""
    if settings.get("image_mode") == "native":
        with Image.open(io.BytesIO(content)) as opened:
            width, height = opened.size
            if opened.getexif().get(0x0112, 1) > 4:
                width, height = height, width
        bounds = {name: settings[name] for name in ("min_pixels", "max_pixels") if name in settings}
        height, width = native_size(height, width, **bounds)
    else:
        size = settings.get("size", {"height": 224, "width": 224})
        height, width = size["height"], size["width"]
    task = ImageTask(content, height, width, center_crop="fixed_resize" in settings)
    (patches,) = CpuDecoder(1, plain=True)([task])
    assert isinstance(patches, Tensor), patches
    return patches.float().mul_(1 / 127.5).sub_(1.0), (height // 16, width // 16)  # as the model's embedding does


@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_training(mode: str) -> None:
    made = GenLIPImageProcessor(**MODES[mode])(
        [Image.open(io.BytesIO(content)) for content in PICTURES.values()], return_tensors="pt"
    )
    patches, grid = pack_images(made["pixel_values"], made.get("image_grid_hw"))
    for name, ours, sides in zip(PICTURES, split_images(patches, grid), grid.tolist(), strict=True):
        expected, (rows, columns) = training_pixels(PICTURES[name], MODES[mode])
        assert sides == [rows, columns] and torch.equal(ours, expected), name


def test_an_upright_image_is_not_turned_again() -> None:
    for turned in (f"turned-{i}" for i in range(1, 9)):
        picture = Image.open(io.BytesIO(PICTURES[turned]))
        upright = to_rgb(picture)
        assert upright.tobytes() == to_rgb(upright).tobytes() == ImageOps.exif_transpose(upright).tobytes(), turned
        assert picture.info  # only the copy has none


def test_sixteen_bit_greys_keep_their_high_byte() -> None:
    grey = Image.new("L", (32, 32), 200)
    for mode in ("I", "I;16", "I;16B"):
        levels = np.full((32, 32), 200 * 256 + 255, ">u2" if mode == "I;16B" else "<u2")
        picture = Image.frombytes("I;16B" if mode == "I;16B" else "I;16", (32, 32), levels.tobytes())
        picture = picture.convert("I") if mode == "I" else picture
        assert picture.mode == mode
        assert torch.equal(
            GenLIPImageProcessor()(picture)["pixel_values"], GenLIPImageProcessor()(grey)["pixel_values"]
        )


def test_arrays_and_tensors_are_accepted_like_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), np.uint8)
    grey, alpha = pixels[0, :, :, 0], np.concatenate((pixels[0], pixels[1, :, :, :1]), axis=2)
    made = GenLIPImageProcessor(image_mode="native")
    for one, other in (
        (pixels[0], Image.fromarray(pixels[0])),
        (pixels, [Image.fromarray(picture) for picture in pixels]),
        (torch.from_numpy(pixels[0]).permute(2, 0, 1), pixels[0]),
        (torch.from_numpy(pixels).permute(0, 3, 1, 2), pixels),
        (
            [pixels[0], torch.from_numpy(pixels[1]).permute(2, 0, 1), Image.fromarray(grey)],
            [pixels[0], pixels[1], grey],
        ),
        (grey[:, :, None], grey),
        (torch.from_numpy(grey)[None], grey),
        (torch.from_numpy(alpha).permute(2, 0, 1), Image.fromarray(alpha)),
    ):
        ours, theirs = made(one), made(other)
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["image_grid_hw"], theirs["image_grid_hw"])
    assert isinstance(made(pixels, return_tensors="np")["pixel_values"], np.ndarray)


GOOD = np.zeros((32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([GOOD, GOOD.astype(np.float32)], "image 1 of 2: values of float32: expected uint8"),
        ([GOOD, b"GIF"], "image 1 of 2: a bytes"),
        ([GOOD.transpose(2, 0, 1)], r"image 0 of 1: shape \[3, 32, 32\].*NumPy arrays have them last"),
        (torch.zeros(32, 32, 3, dtype=torch.uint8), "torch tensors first"),
        (np.zeros((0, 5, 3), np.uint8), "image 0 of 1: shape"),
        ([GOOD, np.zeros((2, 500, 3), np.uint8)], "image 1 of 2: 2x500 pixels: an aspect ratio above 200"),
        ([], "images is empty"),
        (Image.new("F", (32, 32), 0.5), "image 0 of 1: an image of mode F"),
        (Image.new("I", (32, 32), 65536), "mode I with values from 65536 to 65536: expected 16-bit greys"),
        ([GOOD, Image.new("I", (32, 32), -1)], "image 1 of 2: an image of mode I with values from -1 to -1"),
        (Image.open(io.BytesIO(PICTURES["large"][:3000])), "image 0 of 1: .*truncated"),
    ],
)
def test_an_invalid_image_is_named(images: Any, message: str) -> None:
    for settings in ({}, {"image_mode": "native"}):
        with pytest.raises(ValueError, match=message):
            GenLIPImageProcessor(**settings)(images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mode": "squash"}, "image_mode = 'squash': allowed are 'fixed' and 'native'"),
        ({"fixed_resize": "crop"}, "fixed_resize = 'crop'"),
        ({"size": {"height": 220, "width": 224}}, "multiples of 16"),
        ({"min_pixels": 100}, "min_pixels = 100"),
        ({"resample": 3}, "resample = 3: allowed is 2"),
        ({"image_mean": [0.4, 0.5, 0.5]}, "image_mean = "),
        ({"do_normalize": False}, "do_normalize = False: allowed is True"),
    ],
)
def test_settings_that_change_pixels_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenLIPImageProcessor(**settings)
    with pytest.raises(ValueError, match="size = 32: a call cannot change it. Give it to from_pretrained"):
        GenLIPImageProcessor()(GOOD, size=32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    return export(tmp_path_factory.mktemp("native"), demo_data / "tokenizer.model", image_mode="native")


def test_images_and_prompts_become_the_models_input(exported: Path, demo_data: Path) -> None:
    made, tokenizer = (
        AutoProcessor.from_pretrained(exported, trust_remote_code=True),
        load_tokenizer(demo_data / "tokenizer.model"),
    )
    pictures = [Image.open(io.BytesIO(PICTURES[name])) for name in ("wide", "tall")]
    inputs = made(images=pictures, text=["Describe.", " Describe the image. "])
    texts = [tokenizer.encode(text) for text in ("Describe.", "Describe the image.")]
    assert len(texts[0]) < len(texts[1])
    for ids, mask, expected in zip(inputs["input_ids"], inputs["attention_mask"], texts, strict=True):
        assert ids[mask.bool()].tolist() == expected and mask[-1] and int(mask.sum()) == len(expected)
    assert len(inputs["image_grid_hw"]) == 2 and len(inputs["pixel_values"]) == inputs["image_grid_hw"].prod(1).sum()
    default = made(images=pictures[0])
    assert default["input_ids"].tolist() == [tokenizer.encode(DEFAULT_PROMPT)]
    marked = made(images=pictures[0], text="<image>\nDescribe.")
    assert marked["input_ids"].tolist() == [tokenizer.encode("Describe.")]
    assert made(text="Describe.").keys() == {"input_ids", "attention_mask"}
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokens = model.generate(**inputs, max_new_tokens=3)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


def test_text_ends_at_the_end_token(exported: Path, demo_data: Path) -> None:
    made, tokenizer = (
        AutoProcessor.from_pretrained(exported, trust_remote_code=True),
        load_tokenizer(demo_data / "tokenizer.model"),
    )
    text = "Two red crosses at the top left."
    ids = tokenizer.encode(text)
    end = tokenizer.closing_ids[0]
    rows = [[*ids, *tokenizer.closing_ids, *ids], [*ids, end], [end], [*ids, 511]]
    assert tokenizer.vocab_size <= 511
    assert made.batch_decode(rows) == [text, text, "", text]
    assert made.batch_decode(torch.tensor([rows[1]])) == [text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "images = None, text = None: give at least one"),
        ({"images": [GOOD, GOOD], "text": ["a"]}, "1 texts for 2 images"),
        ({"images": [GOOD], "text": " "}, "text 0 of 1 is empty"),
        ({"images": [GOOD], "text": "<image>"}, "text 0 of 1 is empty"),
        ({"images": [GOOD], "text": "<image> or <image>?"}, "text has 2 <image> markers: the model reads one image"),
        ({"images": [GOOD], "text": "a <|im_end|>"}, r"text contains the control token '<\|im_end\|>'"),
        ({"text": []}, "text is empty: expected at least one"),
        ({"images": [GOOD, 3]}, "image 1 of 2: a int"),
    ],
)
def test_invalid_input_is_refused(exported: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoProcessor.from_pretrained(exported, trust_remote_code=True)(**arguments)


@pytest.mark.skipif(not QWEN.is_file(), reason="the Qwen3 tokenizer is not beside the project")
def test_prompt_ids_equal_the_authors(tmp_path: Path) -> None:
    inputs = AutoProcessor.from_pretrained(export(tmp_path, QWEN), trust_remote_code=True)(images=[GOOD, GOOD])
    assert inputs["input_ids"].tolist() == [[74785, 279, 2168, 304, 7716, 13]] * 2
    assert inputs["pixel_values"].shape == (2, 3, 224, 224)
