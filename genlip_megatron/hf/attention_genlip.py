"""Images as packed patches, their rotary positions, and attention over packed samples.

Legend: N tokens of all samples (packed), B samples, L text tokens of a sample, S slots of a sample in the key-value
cache, H heads, C channels of a head, D hidden size, P patches of all images.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_genlip import GenLIPConfig
from .shared_genlip import PATCH_SIZE, PATCH_VALUES


def to_patches(pixels: Tensor) -> Tensor:
    """[B * rows * columns, 768] from [B, 3, height, width]: patches row by row, each as (channel, row, column)."""
    batch, channels, height, width = pixels.shape
    if channels != 3 or height % PATCH_SIZE or width % PATCH_SIZE or not pixels.numel():
        raise ValueError(
            f"pixel_values of shape {list(pixels.shape)}: expected [B, 3, height, width] with sides that are multiples "
            f"of {PATCH_SIZE}"
        )
    grid = pixels.reshape(batch, 3, height // PATCH_SIZE, PATCH_SIZE, width // PATCH_SIZE, PATCH_SIZE)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, PATCH_VALUES)


def pack_images(pixel_values: Tensor | Sequence[Tensor], image_grid_hw: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(patches [P, 768] of all images end to end, int64 [images, 2] rows and columns of each image's patches).

    The arguments are those of ``GenLIPVisionModel.forward``; an image of (0, 0) has no patches.

    Raises:
        ValueError: another shape or dtype, or a grid that does not match the patches.
    """
    images = [pixel_values] if isinstance(pixel_values, Tensor) else list(pixel_values)
    for image in images:
        if not isinstance(image, Tensor) or not image.is_floating_point():
            kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"pixel_values of {kind}: expected normalised floats; GenLIPImageProcessor makes them")
    if isinstance(pixel_values, Tensor) and pixel_values.dim() == 2:
        return _check_packed(pixel_values, image_grid_hw)
    if not images:
        raise ValueError("pixel_values is an empty list: expected at least one image")
    if not isinstance(pixel_values, Tensor):
        for image in images:
            if image.dim() != 3:
                raise ValueError(f"an image of shape {list(image.shape)} in pixel_values: expected [3, height, width]")
        images = [image[None] for image in images]
    elif pixel_values.dim() != 4:
        raise ValueError(
            f"pixel_values of shape {list(pixel_values.shape)}: expected [B, 3, height, width], packed patches "
            f"[P, {PATCH_VALUES}], or a list of [3, height, width]"
        )
    patches = torch.cat([to_patches(image) for image in images])
    sides = [[i.shape[2] // PATCH_SIZE, i.shape[3] // PATCH_SIZE] for i in images for _ in range(i.shape[0])]
    grid = torch.tensor(sides, device=patches.device)
    if image_grid_hw is not None and image_grid_hw.tolist() != sides:
        raise ValueError(f"image_grid_hw = {image_grid_hw.tolist()}: the images of pixel_values have {sides}")
    return patches, grid


def _check_packed(patches: Tensor, grid: Tensor | None) -> tuple[Tensor, Tensor]:
    if grid is None:
        raise ValueError("image_grid_hw = None: packed pixel_values need it, rows and columns of each image's patches")
    if grid.dim() != 2 or grid.shape[1] != 2 or grid.is_floating_point() or bool((grid < 0).any()):
        raise ValueError(f"image_grid_hw of shape {list(grid.shape)}, {grid.dtype}: expected whole numbers [images, 2]")
    count = int(grid.prod(dim=1).sum())
    if patches.shape != (count, PATCH_VALUES):
        raise ValueError(
            f"pixel_values of shape {list(patches.shape)}: image_grid_hw = {grid.tolist()} needs "
            f"[{count}, {PATCH_VALUES}]"
        )
    return patches, grid.long()


def split_images(features: Tensor, image_grid_hw: Tensor) -> list[Tensor]:
    """Features of each image, [patches, D], from packed ones [P, D] or those of images of one size [B, patches, D].

    Row-major, so ``.unflatten(0, grid)`` is a map.
    """
    return list(features.flatten(0, -2).split(image_grid_hw.prod(dim=1).tolist()))


def mean_of_images(features: Tensor, image_grid_hw: Tensor) -> Tensor:
    """[images, D], the mean over each image's patches, from packed features [P, D]."""
    return torch.stack([image.mean(dim=0) for image in split_images(features, image_grid_hw)])


def feature_maps(features: Tensor, pixel_values: Tensor) -> Tensor:
    """[B, D, rows, columns] from packed features [P, D] of images of one size [B, 3, height, width].

    Raises:
        ValueError: images of several sizes, or packed patches.
    """
    if not isinstance(pixel_values, Tensor) or pixel_values.dim() != 4:
        kind = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise ValueError(f"pixel_values of {kind}: feature maps need images of one size, [B, 3, height, width]")
    rows, columns = (side // PATCH_SIZE for side in pixel_values.shape[2:])
    return features.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 2).contiguous()


def image_positions(grid: Tensor, kind: str = "mrope") -> Tensor:
    """int64 [3, P]: (T, H, W) of every patch of all images, with T = 0; for ``kind`` "1d" its index in the image."""
    counts = grid.prod(dim=1)
    columns = grid[:, 1].repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    index = torch.arange(len(columns), device=grid.device) - first
    if kind == "1d":
        return index.expand(3, -1)
    return torch.stack((torch.zeros_like(index), index // columns, index % columns))


def text_start(grid: Tensor, kind: str = "mrope") -> Tensor:
    """int64 [B]: the position, on every axis, of the first text token after each image of ``grid``."""
    return grid.prod(dim=1) if kind == "1d" else grid.amax(dim=1)


def rotary_cos_sin(positions: Tensor, config: GenLIPConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [..., C], of positions [3, ...]; computed in float32 and cast to ``dtype``.

    Channel i of the first half turns by H when ``i % 3 == 1 and i < 3 * mrope_section[1]``, by W when ``i % 3 == 2 and
    i < 3 * mrope_section[2]``, else by T; with "chunked" ``positions`` the sections follow each other. The second half
    repeats the first.
    """
    channels = torch.arange(config.head_dim // 2, device=positions.device)
    time, height, width = config.mrope_section
    axes = torch.zeros_like(channels)
    if config.positions == "chunked":
        axes[channels >= time] = 1
        axes[channels >= time + height] = 2
    else:
        axes[(channels % 3 == 1) & (channels < 3 * height)] = 1
        axes[(channels % 3 == 2) & (channels < 3 * width)] = 2
    inverse = config.rope_theta ** (-channels.to(torch.float32) * 2 / config.head_dim)
    angles = positions.to(torch.float32)[axes].movedim(0, -1) * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` [N, H, C] by the angles of ``cos`` and ``sin`` [N, C]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class PrefixAttention:
    """Exact attention over packed rows, each an image followed by text.

    An image token sees the whole image; a text token sees the image and the text up to itself.

    Args:
        image_lengths: image tokens of each row.
        text_lengths: text tokens of each row.
        device: of the queries.
        cache: stores keys and values, rows padded at the front to the longest.
    """

    def __init__(
        self, image_lengths: list[int], text_lengths: list[int], device: torch.device, cache: Any = None
    ) -> None:
        self.cache = cache
        lengths = [image + text for image, text in zip(image_lengths, text_lengths, strict=True)]
        starts = [0, *itertools.accumulate(lengths)]
        groups: dict[tuple[int, int], list[int]] = {}
        for row, sizes in enumerate(zip(image_lengths, text_lengths, strict=True)):
            if sum(sizes):
                groups.setdefault(sizes, []).append(starts[row])
        # Each group: (image tokens, text tokens, int64 [rows, tokens] positions in the packed order).
        self.groups = [
            (image, text, torch.tensor(rows, device=device)[:, None] + torch.arange(image + text, device=device))
            for (image, text), rows in groups.items()
        ]
        self.order = None  # index of each packed token among the groups' tokens end to end; None: the same order
        if len(self.groups) > 1:
            self.order = torch.cat([places.flatten() for _, _, places in self.groups]).argsort()
        if cache is not None:
            self.cached = (len(lengths), max(lengths))
            offsets = [(row + 1) * self.cached[1] - length for row, length in enumerate(lengths)]
            self.slots = torch.cat(
                [torch.arange(o, o + n, device=device) for o, n in zip(offsets, lengths, strict=True)]
            )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """[N, H, C] from query, key and value [N, H, C]."""
        if self.cache is not None:
            self.cache.update(self._padded(key), self._padded(value), layer)
        outputs = []
        for image, text, places in self.groups:
            # [rows, H, tokens, C]
            q, k, v = (
                (x if self.order is None else x[places.flatten()]).unflatten(0, places.shape).transpose(1, 2)
                for x in (query, key, value)
            )
            parts = []
            if image:
                prefix = slice(0, image)
                parts.append(F.scaled_dot_product_attention(q[:, :, prefix], k[:, :, prefix], v[:, :, prefix]))
            if text:
                seen = torch.ones(text, image + text, dtype=torch.bool, device=q.device).tril(image)
                parts.append(F.scaled_dot_product_attention(q[:, :, image:], k, v, attn_mask=seen))
            outputs.append(torch.cat(parts, dim=2).transpose(1, 2).flatten(0, 1))
        return outputs[0] if self.order is None else torch.cat(outputs)[self.order]

    def _padded(self, x: Tensor) -> Tensor:
        """[B, H, S, C] from [N, H, C]."""
        rows, longest = self.cached
        padded = x.new_zeros(rows * longest, *x.shape[1:]).index_copy(0, self.slots, x)
        return padded.unflatten(0, (rows, longest)).transpose(1, 2)


class CachedAttention:
    """Attention of new text tokens over the cache and themselves.

    Args:
        cache: keys and values, S slots for each row; the new ones are appended.
        lengths: int64 [B], tokens of each row, the new ones included; they fill its last slots.
        count: new tokens of each row, L.
    """

    def __init__(self, cache: Any, lengths: Tensor, count: int) -> None:
        self.cache, self.count = cache, count
        total = cache.get_seq_length() + count
        slots = torch.arange(total, device=lengths.device)
        causal = slots[None] <= slots[total - count :, None]
        self.mask = causal & (slots >= total - lengths[:, None])[:, None, None]  # [B, 1, L, S]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """[B * L, H, C] from query, key and value [B * L, H, C]."""
        query, key, value = (x.unflatten(0, (-1, self.count)).transpose(1, 2) for x in (query, key, value))
        key, value = self.cache.update(key, value, layer)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask).transpose(1, 2).flatten(0, 1)


Attention = PrefixAttention | CachedAttention
