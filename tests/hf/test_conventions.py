"""Exported folders follow the conventions of transformers: pipelines, auto classes, and the usual calls.

Everything gives the numbers of a plain call, or one error that names what is wrong.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoProcessor, pipeline

from genlip_megatron.config import DataConfig
from genlip_megatron.convert.hf_folder import model_card
from genlip_megatron.hf.attention_genlip import to_patches
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel
from tests.hf.models import export, hf_model, images, random_weights, tiny
from tests.hf.test_processing import PICTURES

FIXED: dict[str, Any] = {"image_size": 64}
NATIVE: dict[str, Any] = {"image_mode": "native", "max_pixels": 16384}
PROMPTS = ["Describe.", "Describe the image in detail.", "a"]
SAME = 2e-5  # the same sums in another order (2.9e-6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> dict[str, Path]:
    return {
        name: export(tmp_path_factory.mktemp(name), demo_data / "tokenizer.model", **data)
        for name, data in (("fixed", FIXED), ("native", NATIVE))
    }


@pytest.fixture(scope="module", params=["fixed", "native"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Three images of different sizes."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*s, 3), np.uint8)) for s in ((70, 130), (64, 64), (150, 50))]


def load(kind: Any, folder: Path, **options: Any) -> Any:
    return kind.from_pretrained(folder, trust_remote_code=True, **options)


def features_of(extract: Any, picture: Image.Image) -> Tensor:
    """[1, patches, D] by a plain call of the model with one image."""
    with torch.no_grad():
        return extract.model(**extract.image_processor(picture, return_tensors="pt")).last_hidden_state


def test_image_features_of_a_pipeline_belong_to_their_images(folder: Path, pictures: list[Image.Image]) -> None:
    extract = pipeline("image-feature-extraction", folder, trust_remote_code=True)
    expected = [features_of(extract, picture) for picture in pictures]
    assert all(one.dim() == 3 and len(one) == 1 for one in expected)
    assert (expected[0][0, 0] - expected[1][0, 0]).abs().max() > 0.1
    for batch_size in (1, 2, 3):
        if batch_size > 1 and folder.name.startswith("native"):
            with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
                extract(pictures, batch_size=batch_size)
            found = extract([pictures[2]] * 3, batch_size=batch_size, return_tensors=True)
            wanted = [expected[2]] * 3
        else:
            found, wanted = extract(pictures, batch_size=batch_size, return_tensors=True), expected
        assert len(found) == 3
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.shape == theirs.shape and (ours - theirs).abs().max() < SAME
    assert np.array(extract(pictures[0])).shape == expected[0].shape
    pooled = extract(pictures, pool=True, return_tensors=True)
    assert all((one - full.mean(dim=1)).abs().max() < SAME for one, full in zip(pooled, expected, strict=True))


def test_rows_of_packed_features_are_not_taken_for_images(
    folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    model, processor = load(AutoModel, folders["native"]), load(AutoImageProcessor, folders["native"])
    inputs = processor(pictures)
    output = model(**inputs, output_hidden_states=True)
    for features in (output.last_hidden_state, output.last_hidden_state.float().detach(), output.hidden_states[-1]):
        for index in (1, np.int64(1), torch.tensor(1), (1, slice(None))):
            with pytest.raises(ValueError, match=r"row i is a patch.*split_images.*batch_size = 1"):
                features[index]
        assert torch.equal(copy.deepcopy(features)[:], features[:])
        with pytest.raises(ValueError, match="row i is a patch"):
            list(zip(pictures, features, strict=False))
    parts = model.split_images(output.last_hidden_state, inputs["image_grid_hw"])
    assert [len(part) for part in parts] == inputs["image_grid_hw"].prod(1).tolist()
    one = processor(pictures[1])
    (single,) = model.split_images(model(**one).last_hidden_state, one["image_grid_hw"])
    assert single.shape == parts[1].shape and (single - parts[1]).abs().max() < SAME
    assert torch.equal(to_patches(one["pixel_values"]), processor(pictures[1:2])["pixel_values"])


def caption(model: Any, processor: Any, picture: Image.Image | None, prompt: str) -> str:
    """The new text of one image and prompt."""
    inputs = processor(images=picture, text=prompt)
    tokens = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0]


def test_captions_of_a_pipeline_belong_to_their_images(folder: Path, pictures: list[Image.Image]) -> None:
    model, processor = load(AutoModelForCausalLM, folder), load(AutoProcessor, folder)
    expected = [caption(model, processor, *pair) for pair in zip(pictures, PROMPTS, strict=True)]
    assert len(set(expected)) > 1
    make = pipeline("image-text-to-text", folder, trust_remote_code=True)
    assert type(make.model).__name__ == "GenLIPForCausalLM"
    requests = [{"images": picture, "text": prompt} for picture, prompt in zip(pictures, PROMPTS, strict=True)]
    options = {"max_new_tokens": 4, "return_full_text": False}
    for batch_size in (1, 2, 3):
        # A generator, since 4.57 takes a list of dictionaries for a chat.
        found = list(make((request for request in requests), batch_size=batch_size, **options))
        found = [one[0] if isinstance(one, list) else one for one in found]
        assert [one["generated_text"] for one in found] == expected
    together = make(images=pictures, text=PROMPTS, **options)
    assert [one["generated_text"] for one in together] == expected
    assert make(images=pictures[0], text=PROMPTS[0], **options)[0]["generated_text"] == expected[0]
    with pytest.raises(ValueError, match="chat template"):
        make(text=[{"role": "user", "content": [{"type": "image", "image": pictures[0]}]}], **options)


def test_texts_of_a_pipeline_equal_those_of_single_calls(folder: Path) -> None:
    model, processor = load(AutoModelForCausalLM, folder), load(AutoProcessor, folder)
    write = pipeline("text-generation", folder, trust_remote_code=True)
    expected = [caption(model, processor, None, prompt) for prompt in PROMPTS]
    for batch_size in (1, 2, 3):
        found = write(PROMPTS, batch_size=batch_size, max_new_tokens=4, return_full_text=False, do_sample=False)
        assert [one[0]["generated_text"] for one in found] == expected


def test_pipelines_get_the_pixels_of_training_from_to_rgb(folder: Path) -> None:
    extract = pipeline("image-feature-extraction", folder, trust_remote_code=True)
    for name, differs in (("turned-6", False), ("rgba", True), ("sixteen-bit", True), ("palette", True)):
        picture = Image.open(io.BytesIO(PICTURES[name]))
        expected = features_of(extract, picture)
        given = extract(extract.image_processor.to_rgb(picture), return_tensors=True)
        assert (given - expected).abs().max() < SAME, name
        # Pipelines convert by themselves, which the model card says.
        shown = extract(picture, return_tensors=True)
        assert bool((shown - expected).abs().max() > 0.01) is differs, name


def test_every_auto_class_of_the_folder_loads(folder: Path) -> None:
    classes = {
        name: file.split(".")[1]
        for json_file in ("config.json", "preprocessor_config.json", "processor_config.json")
        for name, file in json.loads((folder / json_file).read_text())["auto_map"].items()
    }
    assert classes.keys() >= {"AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoProcessor"}
    # transformers 5.24 opens no local folder by AutoBackbone (tests/hf/test_heads.py has the way that works).
    classes.pop("AutoBackbone")
    for name, expected in classes.items():
        assert type(load(getattr(transformers, name), folder)).__name__ == expected
    placed = load(AutoModel, folder, device_map="auto", torch_dtype="bfloat16")
    assert placed.dtype == torch.bfloat16 and placed.device.type == "cpu"


@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "longest", "truncation": True, "max_length": 512},
        {"add_special_tokens": False, "return_tensors": "pt", "return_token_type_ids": False},
        {"text_kwargs": {"padding": True}, "images_kwargs": {"do_resize": True}},
        {"common_kwargs": {"return_tensors": "pt"}, "videos": None},
        {"do_convert_rgb": True, "image_mean": (0.5, 0.5, 0.5)},
    ],
)
def test_the_usual_calls_of_a_processor(folder: Path, pictures: list[Image.Image], options: dict[str, Any]) -> None:
    processor = load(AutoProcessor, folder)
    expected = processor(images=pictures, text=PROMPTS)
    found = processor(images=[[picture] for picture in pictures], text=PROMPTS, **options)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_truncation_and_padding_do_what_they_say(folders: dict[str, Path]) -> None:
    processor = load(AutoProcessor, folders["fixed"])
    whole = processor(text=PROMPTS[1])["input_ids"]
    cut = processor(text=PROMPTS, truncation=True, max_length=2)
    assert cut["input_ids"].shape == (3, 2) and torch.equal(cut["input_ids"][1:2], whole[:, :2])
    longer = processor(text=PROMPTS[1], padding="max_length", max_length=whole.shape[1] + 3)
    assert torch.equal(longer["input_ids"][:, 3:], whole) and not longer["attention_mask"][:, :3].any()
    right = processor(text=PROMPTS, padding_side="right", pad_to_multiple_of=8)
    assert right["input_ids"].shape[1] % 8 == 0 and right["attention_mask"][:, 0].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 3}, "max_length = 3: no effect. Add truncation=True"),
        ({"add_special_tokens": True}, "add_special_tokens = True: only False is supported"),
        ({"return_attention_mask": False}, "return_attention_mask = False"),
        ({"do_rescale": False}, "do_rescale = False: allowed is True"),
        ({"images_kwargs": {"image_mean": [0.4, 0.5, 0.5]}}, "image_mean = "),
        ({"max_pixels": 4096}, "max_pixels = 4096: a call cannot change it"),
        ({"crop_size": {"height": 32, "width": 32}}, "crop_size = "),
        ({"videos": [1]}, r"videos = \[1\]: not an option"),
        ({"bogus": 1}, "bogus = 1: not an option of GenLIPImageProcessor"),
        ({"images": None, "bogus": 1}, "bogus = 1: not an option without images"),
        ({"text": [["a"]] * 3}, "text of list: expected a text or a list of texts"),
        ({"images": ["Describe."], "text": "a"}, "image 0 of 1: 'Describe.': no such file"),
        ({"images": [[1, 2]], "text": "a"}, "image 0 of 1: a list"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    folder: Path, pictures: list[Image.Image], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(AutoProcessor, folder)(**{"images": pictures, "text": PROMPTS, **options})


def test_paths_are_images(folder: Path, tmp_path: Path) -> None:
    processor = load(AutoImageProcessor, folder)
    names = ("rgba", "sixteen-bit", "turned-6")
    for name in names:
        (tmp_path / name).write_bytes(PICTURES[name])
    expected = processor([Image.open(tmp_path / name) for name in names])["pixel_values"]
    assert torch.equal(
        processor([tmp_path / names[0], *(str(tmp_path / n) for n in names[1:])])["pixel_values"], expected
    )
    assert processor(str(tmp_path / "rgba"))["pixel_values"].shape[:2] == (1, 3)
    for missing in ("x.jpg", "http://localhost/x.jpg"):
        with pytest.raises(ValueError, match=f"image 0 of 1: '{missing}': no such file.*download URLs first"):
            processor(missing)


def test_an_image_processor_has_the_attributes_of_stock_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    fixed, native = (load(AutoImageProcessor, folders[name]) for name in ("fixed", "native"))
    stock = AutoImageProcessor.from_pretrained(folders["fixed"], trust_remote_code=False, use_fast=False)
    for name in ("do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"):
        for made in (fixed, native):
            assert np.array_equal(np.array(getattr(made, name)), np.array(getattr(stock, name))), name
    assert dict(stock.size) == fixed.size == fixed.crop_size == {"height": 64, "width": 64}
    assert native.size is native.crop_size is None and not fixed.do_center_crop and not native.do_center_crop
    assert GenLIPImageProcessor(fixed_resize="resize-center-crop").do_center_crop
    for name, made in (("fixed", fixed), ("native", native)):
        made.save_pretrained(tmp_path / name)
        again = load(AutoImageProcessor, tmp_path / name)
        assert again.to_dict() == made.to_dict()


def test_assigned_settings_are_checked(folders: dict[str, Path]) -> None:
    native = load(AutoImageProcessor, folders["native"], max_pixels=4096)
    picture = Image.new("RGB", (400, 400))
    assert native(picture)["pixel_values"].shape == (1, 3, 64, 64)
    native.max_pixels = 16384
    assert native(picture)["pixel_values"].shape == (1, 3, 128, 128)
    fixed = load(AutoImageProcessor, folders["fixed"], size={"height": 32, "width": 48})
    assert fixed(picture)["pixel_values"].shape == (1, 3, 32, 48)
    fixed.do_resize = True
    for made, name, value in (
        (fixed, "size", {"height": 33, "width": 48}),
        (fixed, "crop_size", {"height": 16, "width": 16}),
        (fixed, "image_mean", [0.48, 0.46, 0.41]),
        (fixed, "do_center_crop", True),
        (native, "size", {"height": 32, "width": 32}),
        (native, "min_pixels", 10**6),
    ):
        with pytest.raises(ValueError, match=f"{name} = "):
            setattr(made, name, value)
    for name, options in (("fixed", {"do_normalize": False}), ("fixed", {"resample": 3}), ("native", {"size": 32})):
        with pytest.raises(ValueError, match=f"{next(iter(options))} = "):
            load(AutoImageProcessor, folders[name], **options)
    # Older exports have a size for native images too.
    assert GenLIPImageProcessor.from_dict({"image_mode": "native", "size": {"height": 224, "width": 224}}).size is None


def test_options_of_other_models_are_right_or_an_error(folders: dict[str, Path]) -> None:
    model = load(AutoModel, folders["fixed"])
    pixels = torch.stack(images((4, 4), (4, 4)))
    expected = model(pixels)
    for options in ({"output_attentions": False}, {"interpolate_pos_encoding": True}):
        assert torch.equal(model(pixels, **options).last_hidden_state, expected.last_hidden_state)
    weights = random_weights(tiny())
    for kind in ("GenLIPVisionModel", "GenLIPForCausalLM"):
        made = hf_model(kind, tiny(), weights)
        inputs = {"pixel_values": pixels}
        if kind == "GenLIPForCausalLM":
            inputs["input_ids"] = torch.ones(2, 3, dtype=torch.int64)
        with pytest.raises(ValueError, match="output_attentions = True: packed attention has no matrix"):
            made(**inputs, output_attentions=True)
        for name in ("eager", "flash_attention_2", "nonsense"):
            with pytest.raises(ValueError, match=f"attn_implementation = '{name}': only 'sdpa' is supported"):
                made.set_attn_implementation(name)
        made.set_attn_implementation("sdpa")
        made.config.return_dict = False
        assert isinstance(made(**inputs), tuple) and not isinstance(made(**inputs, return_dict=True), tuple)
        made.config.return_dict, made.config._output_attentions = True, True
        with pytest.raises(ValueError, match="output_attentions = True"):
            made(**inputs)
    made.config._output_attentions = False
    with pytest.raises(ValueError, match=r"labels of shape \[2, 2\]: input_ids have \[2, 3\]"):
        made(**inputs, labels=inputs["input_ids"][:, :2])
    for name in ("eager", "nonsense"):
        with pytest.raises(ValueError, match=f"attn_implementation = '{name}': only 'sdpa' is supported"):
            GenLIPVisionModel.from_pretrained(folders["fixed"], attn_implementation=name)
    assert GenLIPVisionModel.from_pretrained(folders["fixed"], attn_implementation="sdpa")(pixels)


def blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_cards_conversion_gives_a_stock_processor_the_pixels_of_training(folders: dict[str, Path]) -> None:
    names: dict[str, Any] = {}
    (code,) = (block for block in blocks((folders["fixed"] / "README.md").read_text()) if "def to_rgb" in block)
    exec(code, names)
    ours = load(AutoImageProcessor, folders["fixed"])
    stock = AutoImageProcessor.from_pretrained(folders["fixed"], trust_remote_code=False, use_fast=False)
    for name, content in PICTURES.items():
        picture = Image.open(io.BytesIO(content))
        found = stock(names["to_rgb"](picture), return_tensors="pt")["pixel_values"]
        assert (found - ours(picture)["pixel_values"]).abs().max() <= 2**-22, name
    for data in (NATIVE, {"fixed_resize": "resize-center-crop"}):
        assert "Without the folder's code" not in model_card(tiny(), DataConfig(**data), "mit", {})
    assert "square, which LLaVA-NeXT makes" in model_card(tiny(), DataConfig(), "mit", {}, llava_next=True)


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("genlip_megatron", "megatron"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
"""
RUN = """
import json, sys
for block in json.load(sys.stdin):
    names = {}
    exec(block, names)
    if "features" in names:
        print("features", tuple(names["features"].shape))
"""


@pytest.mark.slow
def test_the_cards_code_runs_as_it_stands_without_this_package(folder: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (70, 130, 3), np.uint8)
    Image.fromarray(picture).save(folder / "image.jpg")
    code = blocks((folder / "README.md").read_text())
    assert len(code) == 4 + folder.name.startswith("fixed")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCKED + RUN],
        cwd=folder,
        env=environment,
        input=json.dumps(code),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    shape = "(1, 16, 48)" if folder.name.startswith("fixed") else "(1, 32, 48)"
    lines = done.stdout.splitlines()
    assert lines.count(f"features {shape}") == 2 and sum("generated_text" in line for line in lines) == 1
