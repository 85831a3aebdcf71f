"""Augmentations keep what they must keep; the views of evaluations are those of the protocols."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from PIL import Image

from genlip_megatron.evaluate import heads as heads_module
from genlip_megatron.evaluate import labelled, miou, segment, transforms


@pytest.mark.parametrize("module", [transforms, labelled, miou, segment, heads_module])
def test_worked_examples_hold(module: object) -> None:
    failed, tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert tried and not failed


def gradient(width: int, height: int) -> Image.Image:
    """Red is the column, green the row, blue 0."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def test_random_resized_crop_takes_the_areas_and_shapes_it_should() -> None:
    image, areas, aspects = gradient(200, 100), [], []
    for seed in range(300):
        crop = np.asarray(transforms.random_resized_crop(image, 64, np.random.default_rng(seed)), float)
        assert crop.shape == (64, 64, 3)
        width, height = (np.ptp(crop[..., axis]) + 1 for axis in (0, 1))
        areas.append(width * height / 20_000)
        aspects.append(width / height)
    assert 0.06 < min(areas) < 0.12 and 0.6 < max(areas) < 0.76  # at most 133 x 100 of 200 x 100
    assert 0.7 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.4


def test_a_crop_that_never_fits_is_the_centre() -> None:
    crop = np.asarray(
        transforms.random_resized_crop(gradient(250, 10), 32, np.random.default_rng(0), (1.0, 1.0)), float
    )
    assert crop[..., 0].mean() == pytest.approx(124.5, abs=1)


def test_random_transforms_depend_only_on_the_generator() -> None:
    image = gradient(60, 50)
    for transform in (
        lambda rng: transforms.random_resized_crop(image, 32, rng),
        lambda rng: transforms.random_flip(image, rng),
        lambda rng: transforms.color_jitter(image, 0.3, rng),
        lambda rng: transforms.photometric_distortion(image, rng),
    ):
        first, second = (np.asarray(transform(transforms.seeded(3, 5))) for _ in range(2))
        others = [np.asarray(transform(transforms.seeded(3, number))) for number in range(6, 16)]
        assert np.array_equal(first, second) and any(not np.array_equal(first, other) for other in others)


def test_evaluation_view_is_the_centre_of_the_resized_image() -> None:
    view = np.asarray(transforms.resize_and_crop(gradient(256, 128), 112), float)
    assert view.shape == (112, 112, 3)
    assert view[..., 0].mean() == pytest.approx(127.5, abs=1) and view[..., 1].mean() == pytest.approx(63.5, abs=1)


def test_segmentation_crop_moves_image_and_labels_together() -> None:
    labels = np.add.outer(np.arange(60) // 20 * 3, np.arange(90) // 30).astype(np.uint8)
    image = Image.fromarray(np.repeat(labels[..., None] * 25, 3, axis=2))
    for seed in range(20):
        crop, found = transforms.segmentation_crop(image, labels, 32, np.random.default_rng(seed))
        assert crop.size == found.shape[::-1] and max(crop.size) <= 32
        assert np.mean(np.abs(np.asarray(crop)[..., 0] / 25 - found) < 0.5) > 0.8  # other pixels lie on borders


def test_segmentation_crop_avoids_one_class() -> None:
    labels = np.zeros((64, 256), np.uint8)
    labels[:, 192:] = 1
    image = Image.fromarray(np.repeat(labels[..., None], 3, axis=2))
    shares = [
        transforms.segmentation_crop(image, labels, 64, np.random.default_rng(seed))[1].mean() for seed in range(100)
    ]
    assert np.mean([0.25 < share < 0.75 for share in shares]) > 0.6  # about 0.15 with one try


def test_photometric_distortion_keeps_grey_grey_and_in_range() -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    values = []
    for seed in range(200):
        found = np.asarray(transforms.photometric_distortion(grey, np.random.default_rng(seed)), int)
        assert np.ptp(found, axis=2).max() == 0
        values.append(found.mean())
    assert min(values) >= (100 - 32) * 0.5 - 2 and max(values) <= (100 + 32) * 1.5 and np.ptp(values) > 80


def test_padding_does_not_count() -> None:
    pixels, labels = transforms.pad_to(torch.ones(3, 2, 3), np.ones((2, 3), np.uint8), 4)
    assert pixels.shape == (3, 4, 4) and pixels.sum() == 18
    assert (labels == 255).sum() == 10 and (labels == 1).sum() == 6


def test_reduced_labels_of_all_values() -> None:
    table = transforms.reduce_zero_label(np.arange(256, dtype=np.uint8)).tolist()
    assert table == [255, *range(254), 255]
