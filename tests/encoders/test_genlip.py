"""Our own checkpoints and exports behind the encoder interface."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from genlip_megatron.encoders.registry import open_encoder
from genlip_megatron.infer.features import features
from genlip_megatron.infer.load import load
from genlip_megatron.infer.prepare import prepare


class _Image:
    """An image as the tools read it."""

    name: ClassVar = {"path": "image"}

    def __init__(self, image: Image.Image) -> None:
        self._image = image

    def read(self) -> np.ndarray:
        return np.asarray(self._image.convert("RGB"))


@pytest.mark.parametrize("kind", ["1", "TP2", "exported"])
@pytest.mark.slow
def test_features_are_those_of_extract_features(
    kind: str, checkpoints: dict[str, Path], exported: Path, photos: Path
) -> None:
    place = exported if kind == "exported" else checkpoints[kind]
    image = Image.open(photos / "image0.png")
    loaded = load(place, print, encoder_only=True)
    encoder = open_encoder(str(place))
    ready = prepare(0, _Image(image), loaded.image_processor)
    expected = features(loaded, [ready])[0]
    (found,) = encoder.encode([encoder.preprocess(image)])
    torch.testing.assert_close(found.patches, expected, rtol=1e-5, atol=1e-5)
    assert found.grid == (ready.rows, ready.columns) and found.prefix.shape == (0, encoder.dim)


@pytest.mark.slow
def test_layers_and_the_random_control(exported: Path) -> None:
    pixels = torch.randn(3, 32, 48)
    with torch.inference_mode():
        states = load(exported, print, encoder_only=True).model([pixels], output_hidden_states=True).hidden_states
        for layer, state in (("last_block", states[-1]), ("-2", states[-2])):
            (found,) = open_encoder(str(exported), layer=layer).encode([pixels])
            torch.testing.assert_close(found.patches, state.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-5)
        (trained,) = open_encoder(str(exported)).encode([pixels])
        (random,) = open_encoder(f"random:{exported}").encode([pixels])
        (again,) = open_encoder(f"random:genlip:{exported}").encode([pixels])
    assert not torch.allclose(trained.patches, random.patches, atol=1e-2)
    assert torch.equal(random.patches, again.patches)
