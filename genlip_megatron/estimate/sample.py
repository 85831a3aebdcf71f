"""The average sample and its arithmetic, the machine, and the micro-batches of a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genlip_megatron.config import PATCH_SIZE, ModelConfig, RunConfig
from genlip_megatron.model.flops import HOPPER_TFLOPS, training_flops

GIB = 2**30
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Machine:
    """One kind of accelerator, by its data sheet.

    Attributes:
        memory: bytes that one process can allocate.
        peak_tflops: dense bfloat16 rate; MFU is quoted against it.
        memory_gbs: GB/s between a GPU and its memory.
        link_gbs, network_gbs: GB/s that one GPU sends within its node (NVLink, one direction) and to other nodes.
    """

    name: str
    memory: float
    peak_tflops: float
    memory_gbs: float
    link_gbs: float
    network_gbs: float


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("h100", 79.1 * GIB, HOPPER_TFLOPS, 3350.0, 450.0, 50.0),
        Machine("h200", 139.8 * GIB, HOPPER_TFLOPS, 4800.0, 450.0, 50.0),
        Machine("a100-80", 79.1 * GIB, 312.0, 2039.0, 300.0, 25.0),
        Machine("a100-40", 39.4 * GIB, 312.0, 1555.0, 300.0, 25.0),
    )
}


@dataclass(frozen=True)
class SampleMix:
    """The average sample: image tokens, text tokens, and the text tokens that carry loss."""

    image_tokens: int
    text_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """All tokens of the sample."""
        return self.image_tokens + self.text_tokens


def default_mix(config: RunConfig) -> SampleMix:
    """74 text tokens beside a fixed-size image, 200 beside a native one of 1000/1024 of ``max_pixels``.

    All but 6 prompt tokens carry loss; text is cut to the rest of the pack.
    """
    data = config.data
    if data.image_mode == "fixed":
        image, text = (data.image_size // PATCH_SIZE) ** 2, 74
    else:
        image, text = max(1, data.max_pixels // PATCH_SIZE**2 * 1000 // 1024), 200
    text = max(1, min(text, data.seq_length - image))
    return SampleMix(image, text, max(1, text - 6))


def sample_flops(model: ModelConfig, mix: SampleMix) -> float:
    """Useful floating-point operations of training on one sample, as ``flops.training_flops`` counts them."""
    image, text = mix.image_tokens, mix.text_tokens
    pairs = image * text + text * (text + 1) / 2
    counts = [image + text, 1, image, image**2, pairs, mix.answer_tokens, image + text]
    return training_flops(torch.tensor(counts, dtype=torch.float64), model)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Ranks that hold the same part of the model and work on different samples."""
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    return world_size // ranks


def micro_batches(config: RunConfig, world_size: int) -> int:
    """Micro-batches of one rank in a step."""
    share = config.train.micro_batch_size * data_parallel_size(config, world_size)
    return max(1, config.train.global_batch_size // share)
