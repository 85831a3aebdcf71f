"""An exported folder as the ``hf:`` vision tower of LLaVA-NeXT: the right setting gives the encoder's features, and
every wrong setting is an error that names the right one."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel
from tests.plugging.conftest import IMAGE_SIZE
from tests.plugging.llava_next import HFVisionTower, process_images


def tower(folder: Path, layer: int = -1, feature: str | None = "cls_patch", **options: object) -> HFVisionTower:
    """The tower of these settings; ``feature`` None: the default of LLaVA-NeXT, "patch"."""
    args = SimpleNamespace(mm_vision_select_layer=layer)
    if feature:
        args.mm_vision_select_feature = feature
    return HFVisionTower(f"hf:{folder}", args, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Two photographs of noise, one wide and one tall."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 90), (120, 50))]


def expected(folder: Path, pictures: list[Image.Image]) -> torch.Tensor:
    """Features by the project's own processor and model."""
    pixels = GenLIPImageProcessor(size=IMAGE_SIZE)(pictures)["pixel_values"]
    with torch.no_grad():
        return GenLIPVisionModel.from_pretrained(folder).eval()(pixels).last_hidden_state


def test_right_setting_gives_the_features_after_the_last_norm(exported: Path, pictures: list[Image.Image]) -> None:
    loaded = tower(exported, dtype=torch.float32)
    pixels = process_images(pictures, loaded.image_processor, None)
    features = loaded(pixels)
    want = expected(exported, pictures)
    assert features.shape == (2, (IMAGE_SIZE // 16) ** 2, loaded.hidden_size)
    torch.testing.assert_close(features.as_subclass(torch.Tensor), want, rtol=0, atol=1e-4)
    one_by_one = torch.cat([x.as_subclass(torch.Tensor) for x in loaded(list(pixels))])
    torch.testing.assert_close(one_by_one, want, rtol=0, atol=1e-4)


def test_padded_images_and_bfloat16(exported: Path, pictures: list[Image.Image]) -> None:
    loaded = tower(exported)
    pixels = process_images(pictures, loaded.image_processor, "pad")
    features = loaded(pixels)
    assert features.shape == (2, 16, 96) and features.dtype == pixels.dtype and bool(features.isfinite().all())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        *(({"feature": feature}, ValueError, "mm_vision_select_feature = 'cls_patch'") for feature in (None, "patch")),
        *(({"layer": layer}, IndexError, "mm_vision_select_layer = -1") for layer in (-2, 0, 2)),
        *(({"feature": f"slicefour_{kind}"}, ValueError, None) for kind in ("patch", "cls_patch")),
    ],
)
def test_a_class_token_and_other_layers_are_errors(
    settings: dict[str, Any], error: type[Exception], message: str | None, exported: Path
) -> None:
    with pytest.raises(error, match=message):
        tower(exported, **settings)(torch.zeros(1, 3, 64, 64))


def test_pixels_of_the_fallback_processor_are_an_error(exported_native: Path, pictures: list[Image.Image]) -> None:
    # Native sizes have no stock processor, and LLaVA-NeXT does not run the folder's own.
    loaded = tower(exported_native)
    assert type(loaded.image_processor).__name__.startswith("CLIP")
    with pytest.raises(ValueError, match="another image processor"):
        loaded(process_images(pictures, loaded.image_processor, None))


def test_frozen_tower_gives_the_same_features_while_the_rest_trains(exported: Path) -> None:
    loaded = tower(exported, dtype=torch.float32).train()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(loaded(pixels), loaded(pixels))
    loaded.vision_tower.requires_grad_(True)
    assert not torch.equal(loaded(pixels), loaded(pixels))


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
