"""Between the copy of a micro-batch to the device and the optimizer the host never waits for the device.

On a CPU nothing waits, so operations are looked at instead: none may hand a tensor's values, or a shape that depends on
them, to the host. On a GPU torch's own check of synchronisations runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genlip_megatron.batch import PackedBatch, Sample, pack_samples
from genlip_megatron.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from tests.distributed import run_distributed

MODEL = ModelConfig(2, 32, 4, 48, 24, 61, (2, 1, 1), drop_path_rate=0.2)
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
        if func.overloadpacket in _WAITS or masks:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TO_HOST:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waits() -> Iterator[None]:
    """Whatever waits for the device raises."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with _Methods(), _Operations():
            yield


def batch(seed: int) -> PackedBatch:
    """Three samples in one pack of 64, the second without an image."""
    rng = np.random.default_rng(seed)
    samples = []
    for rows, length in ((3, 9), (0, 7), (4, 10)):
        patches = torch.from_numpy(rng.integers(0, 256, (rows * 4, 768), dtype=np.uint8))
        tokens = rng.integers(0, 61, length).tolist()
        samples.append(Sample(patches, rows, 4 * (rows > 0), tokens, [False] * 2 + [True] * (length - 2)))
    made = pack_samples([samples], 64)
    factors = torch.ones(MODEL.num_layers, 2, len(made.sample_starts))
    return PackedBatch(**{**vars(made), "drop_path": factors})


def steps(backend: str) -> None:
    """Two steps of two micro-batches; the second, when all caches are filled, may not wait."""
    from genlip_megatron.model.attention import BACKENDS, two_calls
    from genlip_megatron.parallel import groups
    from genlip_megatron.train.loop import build_run, train_step

    if backend == "two calls":  # its plain kernel reads lengths on the host, which the real ones do not

        class Stub(two_calls.TwoCalls):
            kernel = staticmethod(lambda q, *_, **__: q)

            @staticmethod
            def why_not(place: Any) -> None:
                return None

        BACKENDS["two calls"] = Stub
    config = RunConfig(
        model=MODEL, data=DataConfig(seq_length=64), train=TrainConfig(global_batch_size=2, lr_warmup_iters=0)
    )
    groups.initialize(config)
    run = build_run(config)
    train_step(run, iter([batch(0), batch(1)]))
    if backend != "auto":
        run.model[0].module.attention_backend = backend
    prepare, compute = run.stepper._prepare, run.stepper.run
    guard: list[Any] = []

    def prepare_on_host(micro_batch: PackedBatch) -> Any:
        # Its arithmetic is the host's own; only its copies could wait, and those the GPU's check sees.
        if torch.cuda.is_available():
            return prepare(micro_batch)
        guard.pop().__exit__(None, None, None)
        try:
            return prepare(micro_batch)
        finally:
            guard.append(no_waits())
            guard[-1].__enter__()

    def run_without_waits(*args: Any, **kwargs: Any) -> Any:
        guard.append(no_waits())
        guard[-1].__enter__()
        try:
            return compute(*args, **kwargs)
        finally:
            guard.pop().__exit__(None, None, None)

    run.stepper._prepare, run.stepper.run = prepare_on_host, run_without_waits
    train_step(run, iter([batch(2), batch(3)]))


@pytest.mark.parametrize("backend", ["auto", "two calls", "dense"])
def test_a_step_does_not_wait_for_the_device(backend: str) -> None:
    run_distributed(1, steps, backend)
