"""An exported folder as the ``hf:`` vision tower of LLaVA-NeXT: the right setting gives the encoder's features, and
every wrong setting is an error that names the right one.

LLaVA-NeXT is not on PyPI. The tests of its own tower run with its repository on PYTHONPATH and skip themselves
otherwise. The others hold what that code reads: the calls of the tower, and the stock image processor of the folder.
"""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel
from tests.plugging.conftest import IMAGE_SIZE, random_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder for LLaVA-NeXT."""
    return random_folder(tmp_path_factory.mktemp("plugging") / "tower", llava_next=True, image_size=IMAGE_SIZE)


@pytest.fixture
def llava(monkeypatch: pytest.MonkeyPatch) -> Any:
    """LLaVA-NeXT's own package, whose tower is moved to "cuda" by name; here to the CPU."""
    try:
        package = importlib.import_module("llava.mm_utils")
        package.builder = importlib.import_module("llava.model.multimodal_encoder.builder")
    except Exception as error:
        pytest.skip(f"LLaVA-NeXT, which is not on PyPI, does not import: {error}")
    move = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *words: move(self, *[w for w in words if w != "cuda"]))
    return package


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Two photographs of noise, one wide and one tall."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 90), (120, 50))]


def padded(pictures: list[Image.Image], background: tuple[int, ...]) -> list[Image.Image]:
    """The pictures in the middle of squares."""
    squares = []
    for picture in pictures:
        side = max(picture.size)
        squares.append(Image.new("RGB", (side, side), background))
        squares[-1].paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return squares


def test_the_stock_processor_has_what_llava_next_reads(folder: Path, pictures: list[Image.Image]) -> None:
    """And gives training's pixels of square images, the only ones that pad and anyres give it."""
    processor = AutoImageProcessor.from_pretrained(folder)  # runs no code of the folder
    assert type(processor).__name__.startswith("CLIPImageProcessor")
    assert processor.crop_size["height"] == processor.crop_size["width"] == processor.size["shortest_edge"] == 64
    assert list(processor.image_mean) == [0.5] * 3
    assert json.loads((folder / "config.json").read_text())["image_size"] == 64
    squares = padded(pictures, (127, 127, 127))
    ours = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(ours).__name__ == "GenLIPImageProcessor" and ours.fixed_resize == "squash"
    torch.testing.assert_close(
        processor(squares, return_tensors="pt")["pixel_values"],
        GenLIPImageProcessor(size=IMAGE_SIZE)(squares)["pixel_values"],
        rtol=0,
        atol=1e-6,
    )


def test_the_folder_is_imported_with_the_settings_of_the_run(folder: Path) -> None:
    from genlip_megatron.convert.conversion import folder_images

    images = folder_images(folder, print)
    assert (images["image_mode"], images["fixed_resize"]) == ("fixed", "squash")
    assert images["size"] == {"height": 64, "width": 64}


def test_the_calls_of_the_tower(folder: Path) -> None:
    """Its right setting reads the features; every other is an error that names it."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32).eval()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        states = model.vision_model(pixels, output_hidden_states=True).hidden_states
        expected = GenLIPVisionModel.from_pretrained(folder).eval()(pixels).last_hidden_state
    torch.testing.assert_close(states[-1].as_subclass(torch.Tensor), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="mm_vision_select_feature = 'cls_patch'"):
        states[-1][:, 1:]
    for layer in (-2, 0, 2):
        with pytest.raises(IndexError, match="mm_vision_select_layer = -1"):
            states[layer]


def test_pixels_of_another_processor_are_an_error(exported: Path) -> None:
    vision = GenLIPVisionModel.from_pretrained(exported).eval().vision_model
    with pytest.raises(ValueError, match="another image processor"):
        vision(torch.full((1, 3, 64, 64), 2.2), output_hidden_states=True)


def test_a_frozen_tower_in_training_mode_drops_no_path(folder: Path) -> None:
    vision = GenLIPVisionModel.from_pretrained(folder).train().vision_model
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    vision.requires_grad_(False)
    first, second = (vision(pixels, output_hidden_states=True).hidden_states[-1] for _ in range(2))
    assert torch.equal(first, second)
    vision.requires_grad_(True)
    third, fourth = (vision(pixels, output_hidden_states=True).hidden_states[-1] for _ in range(2))
    assert not torch.equal(third, fourth)


@pytest.mark.parametrize("ratio", ["pad", "anyres", "anyres_max_9"])
def test_the_real_tower_reads_images_of_every_kind(
    ratio: str, llava: Any, folder: Path, pictures: list[Image.Image]
) -> None:
    name = f"hf:{folder}"
    settings = SimpleNamespace(
        mm_vision_tower=name, mm_vision_select_layer=-1, mm_vision_select_feature="cls_patch", image_aspect_ratio=ratio
    )
    settings.image_grid_pinpoints = [[64, 128], [128, 64], [128, 128]]
    tower = llava.builder.build_vision_tower(settings)
    assert (tower.image_size, tower.num_patches_per_side) == (64, 4)
    images = llava.process_images(pictures, tower.image_processor, settings)
    batch = images if ratio == "pad" else torch.cat(list(images))
    features = tower(batch)
    assert features.shape == (len(batch), 16, 96) and bool(features.isfinite().all())
    if ratio == "pad":
        squares = padded(pictures, (127, 127, 127))
        pixels = GenLIPImageProcessor(size=IMAGE_SIZE)(squares)["pixel_values"]
        torch.testing.assert_close(batch, pixels, rtol=0, atol=1e-6)
    grids = [llava.get_anyres_image_grid_shape(x.size, settings.image_grid_pinpoints, 64) for x in pictures]
    assert ratio == "pad" or [len(x) for x in images] == [1 + width * height for width, height in grids]
    crop = tower.image_processor.crop_size
    assert tower(torch.zeros(1, 3, crop["height"], crop["width"])).shape == (1, 16, 96)


def test_callers_of_the_model_itself_cannot_drop_the_first_patch_either(exported: Path) -> None:
    model = GenLIPVisionModel.from_pretrained(exported).eval()
    states = model(torch.zeros(1, 3, 64, 32), output_hidden_states=True).hidden_states
    assert len(states) == 4
    for index in ((slice(None), slice(1, None)), (slice(None), slice(1, None), slice(None))):
        with pytest.raises(ValueError, match="no class token"):
            states[-2][index]
    with pytest.raises(ValueError, match="no class token"):
        torch.cat(states[-2:], dim=-1)[:, 1:]


def test_tensors_computed_from_hidden_states_are_plain(exported: Path) -> None:
    model = GenLIPVisionModel.from_pretrained(exported).eval()
    state = model(torch.zeros(2, 3, 32, 32), output_hidden_states=True).hidden_states[-1]
    for derived in (state + 1, state[:, torch.tensor([1, 2])], state[0], state[:, 1], torch.stack([state, state])):
        assert type(derived) is torch.Tensor
    with torch.no_grad():
        plain = model(torch.zeros(2, 3, 32, 32), output_hidden_states=True).hidden_states[-1]
    assert type(pickle.loads(pickle.dumps(plain))) is torch.Tensor
    state.sum().backward()
    assert model.ln_post.weight.grad is None and model.visual.layers[2].mlp.fc2.weight.grad is not None
