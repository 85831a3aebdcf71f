"""Native-aspect sizes: whole patches, with an area within the limits, for every accepted image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from genlip_megatron.data.resize import MAX_ASPECT_RATIO, most_patches, native_size, native_sizes
from genlip_megatron.hf import image_processing_genlip

SIDE = st.integers(1, 20_000)


def test_worked_examples() -> None:
    assert native_size(224, 224) == (224, 224)
    # Half rounds to even: 2.5 patches are 2, 3.5 are 4.
    assert native_size(40 * 4, 56 * 4) == (160, 224)
    assert native_size(72, 104) == (64, 96)


@given(SIDE, SIDE, st.sampled_from([(4096, 262144), (256, 256), (4096, 4096), (4096, 16384), (1000, 99_999)]))
def test_sizes_are_whole_patches_within_the_bounds(height: int, width: int, area: tuple[int, int]) -> None:
    assume(max(height, width) <= MAX_ASPECT_RATIO * min(height, width))
    rows, columns = (side / 16 for side in native_size(height, width, *area))
    assert rows == int(rows) and columns == int(columns)
    assert rows * columns <= most_patches(*area)
    assert area != (4096, 262144) or rows * columns >= 16


def test_extreme_aspect_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="aspect ratio above 200"):
        native_size(1, 201)


@given(
    st.lists(st.tuples(st.integers(1, 65_535), st.integers(1, 65_535)), min_size=1, max_size=50),
    st.sampled_from([(4096, 262144), (256, 256), (4096, 16384), (1000, 99_999)]),
)
def test_sizes_equal_those_of_the_exported_models(shapes: list[tuple[int, int]], area: tuple[int, int]) -> None:
    shapes = [shape for shape in shapes if max(shape) <= 200 * min(shape)]
    heights, widths = native_sizes(np.array([h for h, _ in shapes]), np.array([w for _, w in shapes]), *area)
    expected = [image_processing_genlip.native_size(height, width, *area) for height, width in shapes]
    assert list(zip(heights, widths, strict=True)) == expected
