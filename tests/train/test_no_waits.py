"""In a training step the host waits for the device once, for the all-reduced statistics.

On a CPU nothing waits, so the test checks every operation instead. None may return a tensor's values to the host, or a
shape that depends on them, and none may copy numbers from the host to the device. On a GPU torch's own check of
synchronisations runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import LINEAR_INPUTS, DataConfig, RunConfig, TrainConfig, override
from genlip_megatron.model.attention import BACKENDS, two_calls
from genlip_megatron.model.specs import transformer_config
from genlip_megatron.model.te_support import why_no_engine
from genlip_megatron.parallel import groups
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.train import forward_backward
from genlip_megatron.train.setup import build_run
from genlip_megatron.train.step import train_step
from tests.train.steps import MODEL, drawn_batch

_ATEN = torch.ops.aten
_WAITS = {
    _ATEN._local_scalar_dense,
    _ATEN._unique2,
    _ATEN.bincount,
    _ATEN.equal,
    _ATEN.is_nonzero,
    _ATEN.masked_select,
    _ATEN.nonzero,
    _ATEN.unique_consecutive,
    _ATEN.unique_dim,
}
_TO_HOST = {
    getattr(torch.Tensor, name) for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__")
}


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func.overloadpacket in (_ATEN.index, _ATEN.index_put, _ATEN.index_put_) and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        )
        if masks and func.overloadpacket is not _ATEN.index:
            masks = args[2].numel() != 1  # one number is filled in where the mask is, and nothing is counted
        if func.overloadpacket in _WAITS or masks:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Allows the first ``tolist``, that of the all-reduced statistics, and counts it in ``allowed``."""

    def __init__(self, allowed: list[int]) -> None:
        super().__init__()
        self.allowed = allowed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and self.allowed[0]:
            self.allowed[0] -= 1
            if not torch.cuda.is_available():
                return func(*args, **kwargs)
            torch.cuda.set_sync_debug_mode("default")
            try:
                return func(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("error")
        to_device = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if not torch.cuda.is_available() and (func in _TO_HOST or to_device):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_waits(allowed: list[int]) -> Iterator[None]:
    """Raise on every wait for the device, except for ``allowed`` calls of ``tolist``."""

    def synchronize(device: Any = None) -> None:  # torch's own check does not count it
        raise AssertionError("torch.cuda.synchronize waits for the device")

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", synchronize))
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            stack.enter_context(_Operations())
        stack.enter_context(_Methods(allowed))
        yield


def batch(seed: int) -> PackedBatch:
    return drawn_batch(seed, 64)


class Stub(two_calls.TwoCalls):
    """Attention without the plain kernel, which reads lengths on the host; real ones do not."""

    kernel = staticmethod(lambda q, *_, **__: q)

    @staticmethod
    def why_not(place: Any) -> None:
        return None


def steps(backend: str, flags: dict[str, Any]) -> None:
    """Two steps of two micro-batches. The second step runs with filled caches and may wait once."""
    train = TrainConfig(global_batch_size=2, lr_warmup_iters=0, clip_grad=1e-3)
    config = override(RunConfig(model=MODEL, data=DataConfig(seq_length=64), train=train), flags)
    groups.initialize(config)
    run = build_run(config)
    train_step(run, iter([batch(0), batch(1)]))
    if backend != "auto":
        run.model[0].module.attention_backend = backend
    prepare, allowed, guard = forward_backward.prepare, [1], contextlib.ExitStack()

    def prepare_on_host(*args: Any) -> Any:
        # It computes on the host. Only its copies could wait, and the check on a GPU finds them.
        if torch.cuda.is_available():
            return prepare(*args)
        guard.close()
        try:
            return prepare(*args)
        finally:
            guard.enter_context(no_waits(allowed))

    batches = iter([batch(2), batch(3)])
    guard.enter_context(no_waits(allowed))
    with (
        guard,
        mock.patch.dict(BACKENDS, {"two calls": Stub}),
        mock.patch.object(forward_backward, "prepare", prepare_on_host),
    ):
        outcome = train_step(run, batches)
    assert outcome.updated
    if not torch.cuda.is_available():  # on the null GPU numbers mean nothing
        assert outcome.grad_norm > run.config.train.clip_grad, "clipping must be checked as well"
    assert allowed == [0]


_TE = {"train.precision": "bf16", "train.transformer_impl": "transformer_engine"}
_FP8 = {**_TE, "train.fp8": "hybrid"}
_CURRENT = {**_FP8, "train.fp8_recipe": "current"}
_OVERLAP = {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}
_TP = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}
_needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
_needs_engine = pytest.mark.skipif(why_no_engine() is not None, reason="needs a GPU and Transformer Engine")


@pytest.mark.parametrize(
    ("backend", "flags", "ranks"),
    [
        ("auto", {}, 1),
        ("two calls", {}, 1),
        ("dense", {}, 1),
        # Recomputing attention restores random states, which on a CPU looks like a wait.
        ("auto", {"parallel.recompute": "selective", "parallel.recompute_modules": list(LINEAR_INPUTS)}, 1),
        ("auto", {"train.precision": "bf16"}, 1),
        ("auto", _OVERLAP, 1),
        ("auto", {**_OVERLAP, "train.global_batch_size": 4}, 2),
        ("auto", {**_TP, "parallel.sequence_parallel": False}, 2),
        # Megatron-Core compares random states there, which on a CPU looks like a wait.
        pytest.param("auto", _TP, 2, id="sequence parallel", marks=_needs_gpu),
        ("auto", {"parallel.context_parallel_size": 2}, 2),
        ("auto", {"parallel.context_parallel_size": 2, "parallel.cp_comm_type": "all_gather"}, 2),
        ("auto", {"parallel.pipeline_model_parallel_size": 2}, 2),
        pytest.param("auto", _TE, 1, id="engine", marks=_needs_engine),
        pytest.param("auto", {**_TE, **_TP}, 2, id="engine TP2", marks=_needs_engine),
        pytest.param("auto", _FP8, 1, id="engine fp8", marks=_needs_engine),
        pytest.param("auto", _CURRENT, 1, id="engine fp8 current", marks=_needs_engine),
    ],
)
@pytest.mark.slow
def test_a_step_waits_for_the_device_once(backend: str, flags: dict[str, Any], ranks: int) -> None:
    run_distributed(ranks, steps, backend, flags)


def test_stages_do_not_wait_for_each_other_on_the_host() -> None:
    assert not transformer_config(RunConfig(model=MODEL)).batch_p2p_sync  # on a CPU there are no batches of sends
