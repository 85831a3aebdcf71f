"""Set and gather the weights of a rank; initial weights are the same on every layout.

Each canonical tensor is drawn whole from a CPU generator keyed by (seed, canonical name), then cut to the rank's part.
So one process and any mix of tensor and pipeline parallelism start from the same model, bit for bit.
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
from genlip_megatron.model.state_dict import LAYER_SCALE, ONES, XAVIER, ZEROS, canonical_shapes, find, find_canonical

if TYPE_CHECKING:
    from genlip_megatron.model.genlip import GenLIP


def initial_tensor(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """float32: the initial value of a canonical tensor, of the kind that the table gives.

    Attention projections are Xavier uniform (q and gate as one [2D, D] matrix), other matrices normal with
    ``model.init_method_std``.
    """
    init = find_canonical(name)[0].init
    constants = {ZEROS: 0.0, ONES: 1.0, LAYER_SCALE: model.layer_scale_init}
    if init in constants:
        return torch.full(shape, constants[init])
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
    if init == XAVIER:
        bound = math.sqrt(6 / (shape[0] + shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape).normal_(0.0, model.init_method_std, generator=generator)


def _layer_offset(model: GenLIP) -> int:
    """Layers on earlier pipeline stages."""
    return model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0


@torch.no_grad()
def fill_weights(model: GenLIP, get: Callable[[str], Tensor]) -> None:
    """Set this rank's parameters from full canonical tensors; ``get`` returns one by name.

    Raises:
        ValueError: a tensor does not have the shape of its parameter; both are named.
    """
    offset = _layer_offset(model)
    size, rank = model.tp_group.size(), model.tp_group.rank()
    for local, parameter in model.named_parameters():
        names, entry = find(local, offset)
        shard = entry.layout.split([get(name) for name in names], model.model_config, size)[rank]
        if shard.shape != parameter.shape:
            raise ValueError(f"{', '.join(names)}: shape {tuple(shard.shape)} for {local} {tuple(parameter.shape)}")
        parameter.copy_(shard)
        # A weight stored in FP8 carries its original values, from which the optimizer makes its float32 weights.
        exact = getattr(parameter, "_high_precision_init_val", None)
        if exact is not None:
            exact.copy_(shard)
        # Megatron-Core marks shards only where it initialises them itself. Without the mark the gradient norm counts
        # a shard on one rank only, as if it were a replica.
        dim = entry.layout.dim
        parameter.tensor_model_parallel = dim is not None
        parameter.partition_dim = -1 if dim is None else dim
        parameter.partition_stride = 1


def fill_initial_weights(model: GenLIP, config: RunConfig) -> None:
    """Set this rank's parameters to the initial weights of the run."""
    shapes = canonical_shapes(config.model)
    fill_weights(model, lambda name: initial_tensor(name, shapes[name], config.model, config.train.seed))


def gather_canonical(model: GenLIP, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full canonical tensors of this pipeline stage, on the CPU of every rank.

    A collective over the tensor-parallel group, and under FSDP over the ranks that share a tensor.

    Args:
        tensors: this rank's parameters or their gradients, by local name.
    """
    offset, size = _layer_offset(model), model.tp_group.size()
    full: dict[str, Tensor] = {}
    for local, tensor in tensors.items():
        tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        shards = [torch.empty_like(tensor) for _ in range(size)]
        torch.distributed.all_gather(shards, tensor.contiguous(), group=model.tp_group)
        names, entry = find(local, offset)
        full |= zip(names, (part.cpu() for part in entry.layout.join(shards, model.model_config)), strict=True)
    return full
