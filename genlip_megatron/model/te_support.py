"""What Transformer Engine can do for a run on this machine: its version, FP8 linears, FP8 attention.

Where its limits come from (versions 2.9 to 2.11): FP8 products ask for 16 bytes of alignment in every dimension that
they sum over; ``nvte_get_fused_attn_backend`` lists the FP8 attention kernels of cuDNN by device, head size, layout and
mask; FP8 attention by current scaling came with pull request 2012, FP8 attention over packed samples (``thd``) after
2.11 with pull request 2994.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass

import torch

from genlip_megatron.config import RunConfig

# Transformer Engine as Megatron-Core 0.16.1 asks for it: from the first version, below the second.
TE_VERSIONS = ((2, 9), (2, 12))

# The names of FP8 recipes here, and Megatron-Core's.
RECIPES = {"delayed": "delayed", "current": "tensorwise"}

_ABSENT = "Transformer Engine is not installed (docs/install-gpu.md)"


def why_no_engine() -> str | None:
    """Why Transformer Engine cannot be used here; None when it can."""
    try:
        found = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return _ABSENT
    first, end = TE_VERSIONS
    if not first <= tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < end:
        allowed = " and below ".join(".".join(map(str, version)) for version in TE_VERSIONS)
        return f"Transformer Engine {found} is not one that Megatron-Core 0.16.1 asks for: {allowed}"
    if not torch.cuda.is_available():
        return f"Transformer Engine {found} runs on GPUs alone, and torch sees none here"
    try:
        # Its torch part is a library of its own, for which Megatron-Core puts a mock where it does not load.
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        return f"Transformer Engine {found} does not load: {error} (docs/install-gpu.md)"
    return None


def fused_norms(config: RunConfig) -> bool:
    """Whether the layers' norms are part of the linears behind them: with Transformer Engine, unless a norm is to be
    recomputed or moved to host memory by itself."""
    parallel = config.parallel
    apart = {"layernorm", "attn_norm", "mlp_norm"}.intersection((*parallel.recomputed, *parallel.offload_modules))
    return config.train.transformer_impl == "transformer_engine" and not apart


def fp8_primary_weights(config: RunConfig) -> bool:
    """Whether the linears hold their weights in FP8 alone."""
    return config.train.fp8 != "none" and config.train.fp8_primary_weights


@dataclass(frozen=True)
class Gpu:
    """What FP8 depends on.

    Attributes:
        capability: compute capability; (0, 0) without a GPU.
        cudnn: version as ``torch.backends.cudnn.version()`` has it, 91300 for 9.13.0; 0 without.
    """

    capability: tuple[int, int] = (0, 0)
    cudnn: int = 0

    @classmethod
    def here(cls) -> Gpu:
        """That of this process."""
        if not torch.cuda.is_available():
            return cls()
        return cls(torch.cuda.get_device_capability(), torch.backends.cudnn.version() or 0)


def why_no_fp8(gpu: Gpu) -> str | None:
    """Why FP8 linears cannot run; None when they can."""
    if gpu.capability >= (8, 9):
        return None
    found = ".".join(map(str, gpu.capability)) if any(gpu.capability) else "no GPU"
    return f"needs compute capability 8.9 or above (Ada, Hopper, Blackwell), here is {found}"


def fp8_head_dim(head_dim: int, capability: tuple[int, int]) -> int:
    """Channels that a head has in FP8 attention, zeros behind its own: Hopper's backward pass knows 128 alone, later
    devices multiples of 16 up to 128.

    >>> fp8_head_dim(72, (9, 0)), fp8_head_dim(72, (10, 0))
    (128, 80)
    """
    return 128 if capability < (10, 0) else -(-head_dim // 16) * 16


def why_no_fp8_images(config: RunConfig, gpu: Gpu) -> str | None:
    """Why image queries cannot attend in FP8; None when they can."""
    if config.data.image_mode != "fixed":
        return (
            "images of data.image_mode = native differ in length, and Transformer Engine 2.9 to 2.11 trains no FP8 "
            "attention over packed samples (thd)"
        )
    if config.model.head_dim > 128:
        return f"needs heads of at most 128 channels, here are {config.model.head_dim}"
    current = config.train.fp8_recipe == "current"
    name, capability, cudnn = ("current", (10, 0), 91400) if current else ("delayed", (9, 0), 90700)
    if gpu.capability[0] == 12:
        return "has no kernel for compute capability 12.0"
    if gpu.capability < capability:
        found = ".".join(map(str, gpu.capability)) if any(gpu.capability) else "no GPU"
        hint = "; on Hopper take --fp8-recipe delayed" if current else ""
        return f"with {name} scaling needs compute capability {capability[0]}.0 or above, here is {found}{hint}"
    if gpu.cudnn < cudnn or gpu.cudnn == 91000:
        return (
            f"with {name} scaling needs cuDNN {cudnn // 10000}.{cudnn // 100 % 100} or above, and not 9.10.0, which is "
            f"faulty; here is {gpu.cudnn // 10000}.{gpu.cudnn // 100 % 100}.{gpu.cudnn % 100}"
        )
    return None


TEXT_IN_BF16 = (
    "text queries attend in BF16: they are packed (thd) and causal to the bottom right, for which Transformer Engine "
    "2.9 to 2.11 has no FP8 kernel"
)


@dataclass(frozen=True)
class Fp8:
    """Which parts of a run compute in FP8.

    Attributes:
        linears: the four linears of a layer.
        images: attention of image queries.
        notes: a line for each part that does not although ``train`` asks for it.
    """

    linears: bool = False
    images: bool = False
    notes: tuple[str, ...] = ()


def choose_fp8(config: RunConfig, gpu: Gpu | None = None) -> Fp8:
    """What computes in FP8 on this machine, or on one with ``gpu``.

    Raises:
        ValueError: a part that ``train`` asks for cannot, and ``train.fp8_fallback`` does not allow BF16 instead.
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
        raise ValueError(f"{notes[0]}; leave it out, or run this part in BF16 with --fp8-fallback")
    notes = [f"{note}: in BF16" for note in notes]
    if images:
        notes.append(TEXT_IN_BF16)
    return Fp8(reason is None, images, tuple(notes))
