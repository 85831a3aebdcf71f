"""Parts of a checkpoint besides the optimizer's state: weights, random states, small objects, the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from genlip_megatron.config import RunConfig
from genlip_megatron.model.fp8_state import fp8_state
from genlip_megatron.model.genlip import unwrap
from genlip_megatron.model.specs import compute_dtype
from genlip_megatron.model.state_dict import is_fp8_state
from genlip_megatron.model.te_support import fp8_primary_weights, fused_norms

# ``dp_reshardable`` state can only be read with the same values: they decide how it is cut and named.
LAYOUT_OF_SHARDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "overlap_grad_reduce",
    "fsdp",
    "precision",
    "fused_norms",
    "fp8_primary_weights",
)


@dataclass
class State:
    """The objects that a checkpoint saves and loads."""

    model: list[Any]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def describe_layout(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The settings that decide which rank holds which part of the state."""
    parallel = config.to_dict()["parallel"]
    return {
        "world_size": world_size,
        "context_parallel_size": parallel["context_parallel_size"],
        "precision": {torch.bfloat16: "bf16", torch.float32: "fp32"}[compute_dtype(config)],
        "fused_norms": fused_norms(config),
        "fp8_primary_weights": fp8_primary_weights(config),
        **{name: parallel[name] for name in LAYOUT_OF_SHARDS if name in parallel},
    }


def random_states() -> dict[str, Tensor]:
    """States of this rank's random generators, uint8, by name."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state if isinstance(state, Tensor) else state.get_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Set this rank's random generators from ``random_states``."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracker = get_cuda_rng_tracker()
    held = tracker.get_states()
    for name, state in held.items():
        saved = states[f"tracker.{name}"]
        held[name] = saved if isinstance(state, Tensor) else state.set_state(saved) or state
    tracker.set_states(held)


@dataclass(frozen=True)
class RandomStates:
    """Random states of all ranks, as parts of a checkpoint.

    Attributes:
        parts: name -> this rank's part of a uint8 tensor [ranks, bytes].
        sizes: name -> bytes.
        world_size: ranks.
    """

    parts: dict[str, ShardedTensor]
    sizes: dict[str, int]
    world_size: int

    @staticmethod
    def of_this_run() -> RandomStates:
        """This run's states: each rank has one row."""
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        states = random_states()
        parts = {
            name: ShardedTensor.from_rank_offsets(f"random.{name}", state[None], (0, rank, world_size), replica_id=0)
            for name, state in states.items()
        }
        return RandomStates(parts, {name: state.numel() for name, state in states.items()}, world_size)

    @staticmethod
    def of_another_run(sizes: dict[str, int], world_size: int) -> RandomStates:
        """All rows on every rank, to copy them from one checkpoint to another."""
        replica = torch.distributed.get_rank()
        rows = {name: torch.zeros(world_size, size, dtype=torch.uint8) for name, size in sizes.items()}
        parts = {
            name: ShardedTensor.from_rank_offsets(f"random.{name}", table, replica_id=replica)
            for name, table in rows.items()
        }
        return RandomStates(parts, dict(sizes), world_size)


def _saved_part(chunk: Any) -> Any:
    """The module that lists a chunk's tensors for a checkpoint: a wrapper that shards parameters, else its model."""
    return chunk if getattr(chunk, "shards_parameters", False) else unwrap(chunk)


def weights_of(model: list[Any]) -> dict[str, dict[str, Any]]:
    """Sharded tensors of this rank's chunks, with copies of their FP8 state. Their names in a checkpoint do not depend
    on the layout."""
    return {f"chunk{i}": _saved_part(chunk).sharded_state_dict() for i, chunk in enumerate(model)}


def has_unsaved_fp8_state(model: list[Any]) -> bool:
    """Whether ``weights_of`` leaves out FP8 state of this rank's chunks, because some layers are in bfloat16."""
    parts = [unwrap(chunk) for chunk in model]
    return any(part.config.first_last_layers_bf16 and any(fp8_state(part)) for part in parts)


def leave_out_fp8_state(weights: dict[str, dict[str, Any]], stored: Metadata) -> list[str]:
    """Remove FP8 state that a checkpoint lacks or has in another shape from ``weights``; returns its keys.

    Args:
        weights: from ``weights_of``.
        stored: the checkpoint's metadata.
    """
    left_out = []
    for chunk in weights.values():
        for name in [name for name in chunk if is_fp8_state(name)]:
            facts = stored.state_dict_metadata.get(chunk[name].key)
            if not isinstance(facts, TensorStorageMetadata) or facts.size != torch.Size(chunk[name].global_shape):
                left_out.append(chunk.pop(name).key)
    return sorted(set(left_out))


def set_weights(model: list[Any], weights: dict[str, dict[str, Any]]) -> None:
    """Set the weights and FP8 state of this rank's chunks from the loaded tensors of ``weights_of``."""
    for i, chunk in enumerate(model):
        _saved_part(chunk).load_state_dict(weights[f"chunk{i}"])


def clear_padding(state: Any) -> None:
    """Zero the padding between parameters in ``dp_reshardable`` optimizer state, so equal states give equal files.

    Megatron-Core leaves it uninitialised.
    """
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        clear_padding(value)
    if isinstance(state, dict) and isinstance(mark := state.get("padding"), LocalNonpersistentObject) and mark.obj:
        for value in state.values():
            if isinstance(value, ShardedTensor):
                value.data.zero_()


def take_objects(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(``state`` without its sharded objects, the objects that this rank saves, by key).

    ``torch_dist`` would pickle the objects, and unpickling runs code. They are few and small, so they go to the common
    part, which is loaded as plain values.
    """
    objects, rest = extract_matching_values(state, lambda value: isinstance(value, ShardedObject))
    mine = {found.unique_key: found.data for found in nested_values(objects) if is_main_replica(found.replica_id)}
    return rest, mine


def put_objects(state: dict[str, Any], objects: dict[str, Any]) -> None:
    """Replace the sharded objects of a ``state`` to load by their values, by key.

    A layer's extra state (of its low-precision arithmetic) is None if the checkpoint has none.
    """

    def put(value: Any) -> Any:
        if not isinstance(value, ShardedObject):
            return value
        extra = value.key.endswith("_extra_state")
        return LocalNonpersistentObject(objects.get(value.unique_key) if extra else objects[value.unique_key])

    dict_list_map_inplace(put, state)
