"""Decoding: DALI and Pillow agree, and a bad image is named without losing its neighbours."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from genlip_megatron.data.decode import CpuDecoder, DaliDecoder, ImageTask, make_decoder, to_patches


def picture(height: int, width: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A smooth picture with edges, which resizing treats differently where filters differ."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [127 + 120 * np.sin(x / 9), 127 + 120 * np.cos(y / 7), 255.0 * ((x // 20 + y // 20) % 2)]
    image = Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, quality=90)
    return out.getvalue()


@pytest.fixture(scope="module")
def dali() -> DaliDecoder:
    return DaliDecoder(1, torch.device("cpu"))


@pytest.mark.parametrize("crop", [False, True])
def test_dali_agrees_with_pillow(dali: DaliDecoder, crop: bool) -> None:
    tasks = [
        ImageTask(picture(height, width), target_height, target_width, crop)
        for height, width, target_height, target_width in [
            (224, 224, 224, 224), (300, 400, 144, 192), (90, 60, 160, 96), (500, 333, 224, 224),
        ]
    ]  # fmt: skip
    for task, ours, oracle in zip(tasks, dali(tasks), CpuDecoder(1, plain=True)(tasks), strict=True):
        assert isinstance(ours, torch.Tensor) and isinstance(oracle, torch.Tensor)
        assert ours.shape == (task.height * task.width // 256, 768)
        # Mean absolute difference of 8-bit values; up to 0.21 was seen.
        assert (ours.int() - oracle.int()).abs().float().mean() <= 1.0


@pytest.mark.parametrize("name", ["dali", "pillow"])
def test_bad_images_are_named_and_the_rest_kept(name: str, dali: DaliDecoder) -> None:
    good = picture(64, 64)
    contents = [good, good[: len(good) // 2], b"", good, b"\xff\xd8 garbage", picture(40, 40, "PNG")]
    decoder = dali if name == "dali" else CpuDecoder(2)
    results = decoder([ImageTask(content, 32, 32) for content in contents])
    assert [isinstance(result, str) for result in results] == [False, True, True, False, True, False]
    assert not isinstance(decoder([ImageTask(good, 32, 32)])[0], str), "the decoder must live on"


def test_transparency_is_white_and_other_modes_become_rgb() -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(clear, "PNG")
    (patch,) = CpuDecoder(1, plain=True)([ImageTask(clear.getvalue(), 16, 16)])
    assert isinstance(patch, torch.Tensor) and patch.min() == 255
    contents = [picture(32, 32, "JPEG", "L"), picture(32, 32, "JPEG", "CMYK"), picture(32, 32, "PNG", "P")]
    for result in CpuDecoder(1, plain=True)([ImageTask(content, 32, 32) for content in contents]):
        assert isinstance(result, torch.Tensor) and result.shape == (4, 768)


def test_patches_are_laid_out_like_a_convolution_weight() -> None:
    pixels = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8)
    patches = torch.from_numpy(to_patches(pixels.numpy())).float()
    convolution = torch.nn.Conv2d(3, 5, 16, 16, bias=False)
    expected = convolution(pixels.permute(2, 0, 1)[None].float())[0].flatten(1).T
    torch.testing.assert_close(patches @ convolution.weight.flatten(1).T, expected, atol=1e-2, rtol=1e-4)


def test_decoder_choice() -> None:
    assert isinstance(make_decoder("auto", 1, torch.device("cpu")), CpuDecoder)
    assert isinstance(make_decoder("dali", 1, torch.device("cpu")), DaliDecoder)
