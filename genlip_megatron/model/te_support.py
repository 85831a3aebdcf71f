"""Transformer Engine on this machine: whether its version, FP8 linears and FP8 attention can be used.

Sources of its limits (versions 2.9 to 2.11): FP8 products need 16-byte alignment in every dimension that they sum over;
``nvte_get_fused_attn_backend`` lists cuDNN's FP8 attention kernels by device, head size, layout and mask; FP8 attention
with current scaling came with pull request 2012, FP8 attention over packed samples (``thd``) after 2.11 with pull
request 2994.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass

import torch

from genlip_megatron.config import RunConfig

# Transformer Engine versions that Megatron-Core 0.16.1 supports: from the first, below the second.
TE_VERSIONS = ((2, 9), (2, 12))

# Our names of FP8 recipes -> Megatron-Core's.
RECIPES = {"delayed": "delayed", "current": "tensorwise"}

_ABSENT = "Transformer Engine is not installed (docs/install-gpu.md)"


def why_no_engine() -> str | None:
    """Why Transformer Engine cannot run here; None when it can."""
    try:
        found = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return _ABSENT
    first, end = TE_VERSIONS
    if not first <= tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < end:
        allowed = " and below ".join(".".join(map(str, version)) for version in TE_VERSIONS)
        return f"Transformer Engine {found} is not a version that Megatron-Core 0.16.1 supports: {allowed}"
    if not torch.cuda.is_available():
        return f"Transformer Engine {found} needs a GPU, and torch sees none"
    try:
        # Its torch part is a separate library; Megatron-Core replaces it by a mock if it does not load.
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        return f"Transformer Engine {found} does not load: {error} (docs/install-gpu.md)"
    return None


def fused_norms(config: RunConfig) -> bool:
    """Whether the layers' norms are fused into the linears behind them: with Transformer Engine, unless a norm is
    recomputed or offloaded separately."""
    parallel = config.parallel
    apart = {"layernorm", "attn_norm", "mlp_norm"}.intersection((*parallel.recomputed, *parallel.offload_modules))
    return config.train.transformer_impl == "transformer_engine" and not apart


def fp8_primary_weights(config: RunConfig) -> bool:
    """Whether the linears store their weights only in FP8."""
    return config.train.fp8 != "none" and config.train.fp8_primary_weights


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU that decide what FP8 can do.

    Attributes:
        capability: compute capability; (0, 0) without a GPU.
        cudnn: version in the form of ``torch.backends.cudnn.version()``, 91300 for 9.13.0; 0 without cuDNN.
    """

    capability: tuple[int, int] = (0, 0)
    cudnn: int = 0

    @classmethod
    def here(cls) -> Gpu:
        """The GPU of this process."""
        if not torch.cuda.is_available():
            return cls()
        return cls(torch.cuda.get_device_capability(), torch.backends.cudnn.version() or 0)


def why_no_fp8(gpu: Gpu) -> str | None:
    """Why FP8 linears cannot run; None when they can."""
    if gpu.capability >= (8, 9):
        return None
    return f"needs compute capability 8.9 or above (Ada, Hopper, Blackwell), {_found(gpu)}"


def _found(gpu: Gpu) -> str:
    return f"not {gpu.capability[0]}.{gpu.capability[1]}" if any(gpu.capability) else "and there is no GPU"


def fp8_head_dim(head_dim: int, capability: tuple[int, int]) -> int:
    """Channels of a head in FP8 attention, padded with zeros: Hopper's backward pass supports only 128, later devices
    multiples of 16 up to 128.

    >>> fp8_head_dim(72, (9, 0)), fp8_head_dim(72, (10, 0))
    (128, 80)
    """
    return 128 if capability < (10, 0) else -(-head_dim // 16) * 16


def why_no_fp8_images(config: RunConfig, gpu: Gpu) -> str | None:
    """Why image queries cannot attend in FP8; None when they can."""
    if config.data.image_mode != "fixed":
        return (
            "images of data.image_mode = native differ in length, and Transformer Engine 2.9 to 2.11 cannot train with "
            "FP8 attention over packed samples (thd)"
        )
    if config.model.head_dim > 128:
        return f"needs a head size of at most 128, not {config.model.head_dim}"
    current = config.train.fp8_recipe == "current"
    name, capability, cudnn = ("current", (10, 0), 91400) if current else ("delayed", (9, 0), 90700)
    if gpu.capability[0] == 12:
        return "has no kernel for compute capability 12.0"
    if gpu.capability < capability:
        hint = "; on Hopper use --fp8-recipe delayed" if current else ""
        return f"with {name} scaling needs compute capability {capability[0]}.0 or above, {_found(gpu)}{hint}"
    if gpu.cudnn < cudnn or gpu.cudnn == 91000:
        return (
            f"with {name} scaling needs cuDNN {cudnn // 10000}.{cudnn // 100 % 100} or above, except 9.10.0, which "
            f"has a bug; installed is {gpu.cudnn // 10000}.{gpu.cudnn // 100 % 100}.{gpu.cudnn % 100}"
        )
    return None


TEXT_IN_BF16 = (
    "text queries attend in BF16: Transformer Engine 2.9 to 2.11 has no FP8 kernel for packed (thd) queries with a "
    "causal mask aligned to the bottom right"
)


@dataclass(frozen=True)
class Fp8:
    """Which parts of a run compute in FP8.

    Attributes:
        linears: the four linears of a layer.
        images: attention of image queries.
        notes: a line for each configured part that does not.
    """

    linears: bool = False
    images: bool = False
    notes: tuple[str, ...] = ()


def choose_fp8(config: RunConfig, gpu: Gpu | None = None) -> Fp8:
    """The parts that compute in FP8 on this machine, or on ``gpu``.

    Raises:
        ValueError: a configured part cannot run in FP8, and ``train.fp8_fallback`` is off.
    """
    train = config.train
    if train.fp8 == "none":
        return Fp8()
    gpu = gpu or Gpu.here()
    notes = []
    reason = why_no_fp8(gpu)
    if reason:
        notes.append(f"train.fp8 = {train.fp8}: {reason}")
    images = train.fp8_attention and not reason
    if images and (reason_images := why_no_fp8_images(config, gpu)):
        notes.append(f"train.fp8_attention: {reason_images}")
        images = False
    if notes and not train.fp8_fallback:
        raise ValueError(f"{notes[0]}. Remove the setting, or run this part in BF16 with --fp8-fallback")
    notes = [f"{note}; it runs in BF16" for note in notes]
    if images:
        notes.append(TEXT_IN_BF16)
    return Fp8(reason is None, images, tuple(notes))
