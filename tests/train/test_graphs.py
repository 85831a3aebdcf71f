"""CUDA graphs of a micro-batch: a run with graphs computes the same as a run without.

On a CPU a stand-in replays a captured pass: it runs the same function again on the tensors and numbers of the capture.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from genlip_megatron.batch import PackedBatch, Sample, pack_samples
from genlip_megatron.config import DataConfig, RunConfig, TrainConfig, override
from genlip_megatron.model.attention import BACKENDS, two_calls
from genlip_megatron.model.specs import check_machine
from genlip_megatron.parallel import groups
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.train import graphs, setup
from genlip_megatron.train.step import train_step
from tests.train.steps import MODEL, drawn_batch

SLOTS = 256
MANY = (5,) * 33  # more samples than the power of two that three samples fit


def batch(seed: int, lengths: tuple[int, ...] = (9, 7, 10)) -> PackedBatch:
    return drawn_batch(seed, SLOTS, lengths)


class Poisoned(torch.autograd.Function):
    """``x`` and its gradient with NaN after row ``used``, like the uninitialised memory of a kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, used: int) -> Tensor:
        ctx.used = used
        out = x.clone()
        out[used:] = float("nan")
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        grad[ctx.used :] = float("nan")
        return grad, None


def careless_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> Tensor:
    """The plain kernel, which like a GPU's leaves rows after the last sequence uninitialised."""
    assert max_q >= int(cu_q.diff().max()) and max_k >= int(cu_k.diff().max())
    queries, keys = int(cu_q[-1]), int(cu_k[-1])
    q, k, v = Poisoned.apply(q, queries), Poisoned.apply(k, keys), Poisoned.apply(v, keys)
    some = cu_q.diff() > 0
    cu_q, cu_k = (torch.cat((cu[:1], cu[1:][some])) for cu in (cu_q, cu_k))
    out = two_calls.reference_kernel(q[:queries], k[:keys], v[:keys], cu_q, cu_k, max_q, max_k, causal, scale)
    return torch.cat((out, torch.full((len(q) - queries, *q.shape[1:]), float("nan"))))


class Careless(two_calls.TwoCalls):
    kernel = staticmethod(careless_kernel)

    @staticmethod
    def why_not(place: Any) -> None:
        return None


def graph_config(graphed: bool) -> RunConfig:
    train = TrainConfig(global_batch_size=3, lr_warmup_iters=0, lr=1e-2, cuda_graph=graphed)
    return RunConfig(model=MODEL, data=DataConfig(seq_length=SLOTS), train=train)


def streams_of_ddp(graphed: bool) -> tuple[bool, list[str]]:
    """(whether DDP was built on its own stream, which stream waited for which)."""
    waits, within, seen = [], ["default"], []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            waits.append(f"{self.name} for {other.name}")

    @contextlib.contextmanager
    def use(stream: Any) -> Iterator[None]:
        within.append(stream.name)
        yield
        within.pop()

    class Watched(DistributedDataParallel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            seen.append(within[-1])
            super().__init__(*args, **kwargs)

    config = graph_config(graphed)
    groups.initialize(config)
    with (
        mock.patch.object(torch.cuda, "current_stream", lambda: Stream("default")),
        mock.patch.object(torch.cuda, "Stream", Stream),
        mock.patch.object(torch.cuda, "stream", use),
        mock.patch.object(setup, "DistributedDataParallel", Watched),
    ):
        setup.build_run(config)
    return seen == ["side"], [wait for wait in waits if wait != "default for default"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU a capture shows it")
def test_ddp_is_built_on_a_stream_that_can_be_captured() -> None:
    assert run_distributed(1, streams_of_ddp, True) == [(True, ["side for default", "default for side"])]
    assert run_distributed(1, streams_of_ddp, False) == [(False, [])]


def trained(
    graphed: bool, micro_batches: list[PackedBatch], most: int = 8, releases: int | None = None, fails: int = 0
) -> dict[str, Any]:
    """Losses and final weights of steps of three micro-batches each, and the number of replayed micro-batches.

    Args:
        most: limit of graphs.
        releases: limit of releases; if given, no memory is free beside the graphs.
        fails: number of the capture that runs out of memory.
    """
    captured: list[Any] = []

    def check_given_up(stage: Any, text: str) -> None:
        gc.collect()  # the stand-in is in a reference cycle
        assert "released" not in text or all(graph() is None for graph in captured), "something keeps a graph's memory"

    class Again(graphs.Graph):
        def _capture(self, pool: Any) -> tuple[Callable[[], None], Callable[[], None]]:
            self.taken = 1
            captured.append(weakref.ref(self))
            if len(captured) == fails:
                raise torch.OutOfMemoryError("as a device says it")
            return self._run_forward, self._run_backward

    config = graph_config(graphed)
    groups.initialize(config)
    run = setup.build_run(config)
    if not torch.cuda.is_available():
        run.model[0].module.attention_backend = "careless"
        if run.graphed_stage:
            run.graphed_stage._kind = Again
    batches, losses = iter(micro_batches), []
    limits = {"_MOST_GRAPHS": most, "_MOST_RELEASES": releases or 8}
    with (
        mock.patch.multiple(graphs, **limits, memory_beside=lambda taken: 0 if releases else taken),
        mock.patch.object(graphs.GraphedStage, "_tell", check_given_up),
        mock.patch.dict(BACKENDS, careless=Careless),
    ):
        for _ in range(len(micro_batches) // 3):
            outcome = train_step(run, batches)
            assert outcome.updated
            losses.append(outcome.loss)
    weights = {name: parameter.detach().cpu() for name, parameter in run.model[0].named_parameters()}
    stage = run.graphed_stage
    counts = {"replayed": stage.replayed, "released": stage.released} if stage else {}
    return {"losses": losses, "weights": weights, **counts}


@pytest.mark.parametrize(
    ("most", "releases", "replayed", "released"), [(8, None, 11, 0), (1, None, 9, 0), (1, 8, 9, 3), (1, 1, 1, 1)]
)
@pytest.mark.slow
def test_a_run_with_graphs_equals_a_run_without(most: int, releases: int | None, replayed: int, released: int) -> None:
    """Two shapes; the rare one has more samples than fit the other's power of two."""
    micro_batches = [batch(seed, *([MANY] if seed % 3 == 1 and seed < 12 else [])) for seed in range(15)]
    (plain,) = run_distributed(1, trained, False, micro_batches)
    (graphed,) = run_distributed(1, trained, True, micro_batches, most, releases)
    assert (graphed["replayed"], graphed["released"]) == (replayed, released)
    # On a CPU the stand-in repeats the operations of a plain pass; the difference measured was 0.
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if torch.cuda.is_available() else {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(graphed["losses"], plain["losses"], **tolerance)
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(graphed["weights"][name], weight, **tolerance, msg=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that memory runs out")
def test_a_capture_that_runs_out_of_memory_releases_only_the_graphs() -> None:
    micro_batches = [batch(seed, *([MANY] if seed % 2 else [])) for seed in range(12)]
    (plain,) = run_distributed(1, trained, False, micro_batches)
    (graphed,) = run_distributed(1, trained, True, micro_batches, 8, None, 2)  # the second shape's first
    assert (graphed["replayed"], graphed["released"]) == (7, 1)
    np.testing.assert_allclose(graphed["losses"], plain["losses"], rtol=1e-5, atol=1e-6)


def test_fixed_shapes_are_fixed() -> None:
    first, second = batch(0).with_fixed_shapes(), batch(1).with_fixed_shapes()
    assert first.patches is not None and first.patches.shape == (SLOTS, 768)
    shapes = [{name: x.shape for name, x in vars(b).items() if isinstance(x, Tensor)} for b in (first, second)]
    assert shapes[0] == shapes[1]
    plain = batch(0)
    assert int(first.loss_weights.sum()) == int(plain.loss_weights.sum())
    assert plain.patches is not None and torch.equal(first.patches[: len(plain.patches)], plain.patches)
    many = pack_samples([[Sample(None, 0, 0, [1, 2, 3], [False, True, True])] * 33], SLOTS).with_fixed_shapes()
    assert many.sample_starts.shape == (64,) and many.loss_rows.shape == (128,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="train.cuda_graph = True: needs a CUDA device"):
        check_machine(override(RunConfig(), {"train.cuda_graph": True}))
