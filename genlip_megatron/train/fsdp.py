"""Fully sharded data parallelism: torch's ``fully_shard`` (FSDP2) inside Megatron-Core's training step.

Weights, gradients and both Adam moments are float32 shards along dimension 0, over the data- and context-parallel
ranks of a tensor-parallel rank. A layer's full weights exist only while it runs, in the compute dtype: they are
gathered before its forward and its backward pass. Its gradients are reduced in float32 after each backward pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from genlip_megatron.device import current_device
from genlip_megatron.model.genlip import GenLIP

_MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def full_values(tensor: Tensor) -> Tensor:
    """All values of a sharded tensor, on the CPU. A collective over the ranks that hold shards."""
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().cpu()


@torch.no_grad()
def set_values(tensor: Tensor, full: Tensor) -> None:
    """Set this rank's shard of ``tensor`` from the ``full`` values."""
    assert isinstance(tensor, DTensor)
    shard = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.to_local().copy_(shard.to_local())


class FullyShardedDataParallel(_BaseDataParallel):
    """Replaces Megatron-Core's ``DistributedDataParallel`` around a model without pipeline stages.

    Megatron-Core 0.16.1's ``TorchFullyShardedDataParallel`` does not fit: it averages gradients over ranks, does not
    divide them by the number of tokens, computes in the dtype of the optimizer's weights, and needs CUDA.
    """

    shards_parameters = True  # so that checkpoints ask this wrapper, not the model within

    def __init__(self, config: TransformerConfig, ddp_config: DistributedDataParallelConfig, module: GenLIP) -> None:
        assert module.embed is not None and module.head is not None, "one pipeline stage"
        super().__init__(config=config, module=module)
        self.ddp_config = ddp_config
        # Taken before sharding: modules describe plain tensors only, and checkpoints do not depend on FSDP.
        entries, names = module.sharded_state_dict(), dict(module.named_parameters())
        self._entries = {name: entry.without_data() for name, entry in entries.items() if name in names}
        self._others = {name: entry for name, entry in entries.items() if name not in names}
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        # torch caches plans of equal meshes; the group's name separates this mesh from those of destroyed groups.
        mesh = DeviceMesh.from_group(group, current_device().type, mesh_dim_names=(f"dp_cp_{group.group_name}",))
        # Inputs have the right dtype already; casting would round the loss weights.
        policy = MixedPrecisionPolicy(config.params_dtype, torch.float32, cast_forward_inputs=False)
        marks = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
        module.float()
        for unit in (module.embed, *module.decoder.layers, module.head, module):
            # Reshard even if backward follows at once; after a validation full weights would remain.
            sharded = fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            # The loss is a sum over tokens, so gradients are too; ``scale_gradients`` divides them.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(module.head, "logits")
        for name, parameter in module.named_parameters():
            for mark, value in marks[name].items():
                setattr(parameter, mark, value)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Do nothing: every backward pass has reduced its gradients."""

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiply all gradients."""
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.to_local().mul_(scaling_factor)

    def entry(self, name: str, full: Tensor, prefix: str = "") -> ShardedTensor | ShardedTensorFactory:
        """``full``, all values of parameter ``name`` or of one of its moments, as a part of a checkpoint."""
        entry = self._entries[name]
        new: dict[str, Any] = {"key": prefix + entry.key, "data": full}
        if isinstance(entry, ShardedTensor):
            new["dtype"] = full.dtype
        return replace(entry, **new)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """The same as that of the model within. A collective."""
        dtype = self.config.params_dtype
        weights = {name: self.entry(name, full_values(p).to(dtype)) for name, p in self.module.named_parameters()}
        return weights | self._others

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Set the weights from full tensors."""
        for name, parameter in self.module.named_parameters():
            set_values(parameter, state_dict[name])


class FullyShardedOptimizer(FP32Optimizer):
    """Megatron-Core's optimizer on shards, with the distributed optimizer's ``fully_reshardable`` checkpoints."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, model: FullyShardedDataParallel
    ) -> None:
        super().__init__(optimizer, config, lambda *_: None)
        self.model = model

    def _tensors(self) -> list[tuple[str, dict[str, Tensor]]]:
        """(name, {"param": value, moment: value}) of every trained parameter."""
        tensors = []
        for name, parameter in self.model.module.named_parameters():
            if not parameter.requires_grad:
                continue
            state = self.optimizer.state[parameter]
            for moment in _MOMENTS:
                state.setdefault(moment, torch.zeros_like(parameter))
            tensors.append((name, {"param": parameter} | {moment: state[moment] for moment in _MOMENTS}))
        return tensors

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict | None = None
    ) -> dict[str, Any]:
        """Full values of weights and moments. A collective."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        state = {
            index: {
                kind: self.model.entry(name, full_values(tensor), f"optimizer.state.{kind}.")
                for kind, tensor in tensors.items()
            }
            for index, (name, tensors) in enumerate(self._tensors())
        }
        return {
            "optimizer": {"param_groups": groups},
            "param_state": state,
            "param_state_sharding_type": "fully_reshardable",
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set weights, moments and the groups' settings."""
        for group, saved in zip(self.param_groups, state_dict["optimizer"]["param_groups"], strict=True):
            parameters = group["params"]
            group.clear()  # before the first update there is no "step"
            group.update(saved, params=parameters)
        for index, (_, tensors) in enumerate(self._tensors()):
            for kind, tensor in tensors.items():
                set_values(tensor, state_dict["param_state"][index][kind])
