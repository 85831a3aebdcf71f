"""Initial weights that are the same on every layout.

Each full tensor is drawn from a CPU generator keyed by (seed, canonical name), then cut to the rank's part. So one
process and any mixture of tensor and pipeline parallelism start from the same model, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from genlip_megatron.config import ModelConfig, RunConfig
from genlip_megatron.convert.table import canonical_shapes, find

if TYPE_CHECKING:
    from genlip_megatron.model.genlip import GenLIP

_XAVIER = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight")


def initial_tensor(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """float32: the initial value of a canonical tensor.

    Biases 0, norms 1 and 0, LayerScale its setting, attention projections Xavier uniform (q and gate as one
    [2D, D] matrix), everything else normal with ``model.init_method_std``.
    """
    if name.endswith(".lambda1"):
        return torch.full(shape, model.layer_scale_init)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
    if name.endswith(_XAVIER):
        bound = math.sqrt(6 / (shape[0] + shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape).normal_(0.0, model.init_method_std, generator=generator)


@torch.no_grad()
def fill_weights(model: GenLIP, get: Callable[[str], Tensor]) -> None:
    """Set this rank's parameters from full canonical tensors; ``get`` returns one by name.

    Raises:
        ValueError: a tensor does not have the shape of its parameter; both are named.
    """
    offset = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    size, rank = model.tp_group.size(), model.tp_group.rank()
    for local, parameter in model.named_parameters():
        names, layout = find(local, offset)
        shard = layout.split([get(name) for name in names], model.model_config, size)[rank]
        if shard.shape != parameter.shape:
            raise ValueError(f"{', '.join(names)}: shape {tuple(shard.shape)} for {local} {tuple(parameter.shape)}")
        parameter.copy_(shard)
        # A weight held in FP8 carries what it was made from, which the optimizer's float32 weights are made from.
        exact = getattr(parameter, "_high_precision_init_val", None)
        if exact is not None:
            exact.copy_(shard)
        # Megatron-Core marks shards only where it initialises them itself. Without the mark, the gradient norm takes
        # a shard for a replica and counts it on one rank alone.
        parameter.tensor_model_parallel = layout.dim is not None
        parameter.partition_dim = -1 if layout.dim is None else layout.dim
        parameter.partition_stride = 1


def fill_initial_weights(model: GenLIP, config: RunConfig) -> None:
    """Set this rank's parameters to the initial weights of the run."""
    shapes = canonical_shapes(config.model)
    fill_weights(model, lambda name: initial_tensor(name, shapes[name], config.model, config.train.seed))


def gather_canonical(model: GenLIP, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full canonical tensors of this pipeline stage from every rank's local ones (parameters or their gradients).

    A collective over the tensor-parallel group, and over the ranks that share a tensor under FSDP; every rank gets the
    result, on the CPU.
    """
    offset = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    size = model.tp_group.size()
    full: dict[str, Tensor] = {}
    for local, tensor in tensors.items():
        tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        shards = [torch.empty_like(tensor) for _ in range(size)]
        torch.distributed.all_gather(shards, tensor.contiguous(), group=model.tp_group)
        names, layout = find(local, offset)
        full |= zip(names, (part.cpu() for part in layout.join(shards, model.model_config)), strict=True)
    return full
