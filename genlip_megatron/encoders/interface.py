"""The interface that every vision encoder offers: image tensors in, features of patches out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from genlip_megatron.encoders.flags import AFTER_NORM, LAST_BLOCK
from genlip_megatron.hf.image_processing_genlip import to_rgb


@dataclass(frozen=True)
class Features:
    """What an encoder computed for one image.

    Attributes:
        patches: [h * w, D], row by row.
        prefix: [k, D], the tokens that are not patches: the class token, then registers; k may be 0.
        grid: (h, w), rows and columns of patches.
    """

    patches: Tensor
    prefix: Tensor
    grid: tuple[int, int]


class Encoder(ABC):
    """A frozen or trainable vision encoder.

    Args:
        name: what the user called it, for messages, tables and plots.
        module: the network, in evaluation mode on its device.
        dim: D, width of the features.
        patch: side of a patch in pixels.
        size: side of the square images that it was made for; None: images keep their shape.
        mean, std: normalisation of each colour channel, for pixels in [0, 1].
        layer: "after_norm", "last_block", or "-2" and so on: output of the k-th block from the end.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        dim: int,
        patch: int,
        size: int | None,
        mean: Sequence[float],
        std: Sequence[float],
        layer: str = AFTER_NORM,
    ) -> None:
        self.name, self.module, self.layer = name, module, layer
        self.dim, self.patch, self.size = dim, patch, size
        self.mean, self.std = tuple(mean), tuple(std)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return next(self.module.parameters()).dtype

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of all that decides the features: weights, layer, preprocessing, kind of network."""
        digest = hashlib.blake2b(digest_size=16)
        facts = (
            type(self).__name__,
            type(self.module).__name__,
            self.layer,
            self.dim,
            self.patch,
            self.size,
            self.mean,
            self.std,
        )
        digest.update(repr((*facts, self.preprocessing_facts())).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def preprocessing_facts(self) -> tuple[Any, ...]:
        """Settings besides ``size`` that change ``resize``."""
        return ()

    def resize(self, image: Image.Image) -> Image.Image:
        """An RGB image as the encoder wants it by default: squashed to ``size`` x ``size``, bicubic."""
        assert self.size is not None, "encoders of native sizes have their own resize"
        return to_rgb(image).resize((self.size, self.size), Image.Resampling.BICUBIC)

    def to_tensor(self, image: Image.Image | np.ndarray) -> Tensor:
        """float32 [3, height, width], normalised, of an RGB image whose size already fits."""
        # NumPy, because torch would share each of these small operations among its threads.
        pixels: np.ndarray = np.asarray(image, np.float32) / np.float32(255)
        pixels = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def preprocess(self, image: Image.Image) -> Tensor:
        """float32 [3, height, width] of an image of any size and mode."""
        return self.to_tensor(self.resize(image))

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, naming the encoder, if it cannot read images of this size."""
        if height % self.patch or width % self.patch or not height or not width:
            raise ValueError(
                f"--encoder {self.name}: an image of {height} x {width} pixels has no whole number of "
                f"{self.patch} x {self.patch} patches. Choose multiples of {self.patch}."
            )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of this size."""
        return height // self.patch, width // self.patch

    def encode(self, images: Sequence[Tensor]) -> list[Features]:
        """Features of normalised images [3, height, width] of any sizes that ``check_size`` accepts.

        Images of one size run as one batch. Gradients flow unless the caller turns them off.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            height, width = image.shape[1:]
            groups.setdefault((height, width), []).append(number)
        found: dict[int, Features] = {}
        for (height, width), numbers in groups.items():
            self.check_size(height, width)
            batch = torch.stack([images[number] for number in numbers]).to(self.device, self.dtype)
            grid = self.grid(height, width)
            prefix, patches = self._encode_batch(batch, grid)
            for row, number in enumerate(numbers):
                found[number] = Features(patches[row], prefix[row], grid)
        return [found[number] for number in range(len(images))]

    @abstractmethod
    def _encode_batch(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(prefix [B, k, D], patches [B, h * w, D]) of images [B, 3, height, width] of one size."""


def layer_from_end(layer: str, blocks: int, name: str) -> int | None:
    """How many blocks run for ``layer``, or None for all of them and the final norm.

    Raises:
        ValueError: not "after_norm", "last_block" or a number from -1 down to minus the number of blocks.

    >>> layer_from_end("-2", 12, "x"), layer_from_end("last_block", 12, "x"), layer_from_end("after_norm", 12, "x")
    (11, 12, None)
    """
    if layer == AFTER_NORM:
        return None
    number = -1 if layer == LAST_BLOCK else int(layer) if layer.lstrip("-").isdigit() else 0
    if not -blocks <= number <= -1:
        raise ValueError(
            f"--layer {layer}: encoder {name} has {blocks} blocks. Allowed are {AFTER_NORM}, {LAST_BLOCK}, "
            f"and -1 (the last block) to -{blocks}."
        )
    return blocks + 1 + number


class BlockOutput:
    """Keeps the output of one block of a network during a forward pass.

    Args:
        block: the block, whose output is a tensor [B, tokens, D] or a tuple that starts with it.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self.value: Tensor

    def __enter__(self) -> BlockOutput:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self.value = output if isinstance(output, Tensor) else output[0]

        self._handle = self._block.register_forward_hook(keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def check_equal_grids(encoders: Sequence[Encoder], sizes: Sequence[int | None], allow_unequal: bool) -> None:
    """Raise ValueError if encoders of one comparison see different numbers of patches.

    Args:
        encoders: those of the comparison.
        sizes: side of the images that each gets, in pixels; None: native shapes, which differ between images.
        allow_unequal: the user asked for it.
    """
    if allow_unequal or len(encoders) < 2:
        return
    if None in sizes:
        raise ValueError(
            "unequal grids of patches: an encoder reads native shapes. Choose sizes with --size that give the same "
            "grid, or pass --allow-unequal."
        )
    grids = {encoder.name: encoder.grid(size, size) for encoder, size in zip(encoders, sizes, strict=True) if size}
    if len(set(grids.values())) > 1:
        listed = ", ".join(f"{name} {h}x{w}" for name, (h, w) in grids.items())
        raise ValueError(
            f"unequal grids of patches: {listed}. Choose sizes with --size that give the same grid (336 for /14 and "
            "384 for /16 give 24x24), or pass --allow-unequal."
        )
