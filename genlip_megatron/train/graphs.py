"""CUDA graphs of a micro-batch's forward and backward pass, replayed without launching kernels from the host.

Micro-batches come ``with_fixed_shapes``, so few shapes occur. The first micro-batches of a shape run without a graph,
which warms up libraries and compilers. Then both passes are captured; later micro-batches are copied to the graph's
inputs and replayed. Shapes beyond the limit of graphs keep running without one, with the same result.

The backward graph adds weight gradients to the buffers of Megatron-Core's DistributedDataParallel itself: DDP's hooks
on parameters are Python, which a graph does not capture. Graphs share one memory pool that passes without a graph
cannot use. If both do not fit, the graphs are released and captured again later.

Not used: ``torch.cuda.make_graphed_callables`` hands the gradients of all weights to autograd and takes only flat
tensors; Megatron-Core's ``FullCudaGraphWrapper`` captures the whole step with its reductions, and needs one shape for
all micro-batches of a run.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.device import current_device
from genlip_megatron.log import log
from genlip_megatron.model.attention import PackedAttention
from genlip_megatron.model.attention.backend import Backend
from genlip_megatron.model.attention.rows import Rows
from genlip_megatron.model.attention.two_calls import KernelCall
from genlip_megatron.model.embed import ImageSlots

_WARM_UP = 2  # micro-batches of a shape that run without a graph
_MOST_GRAPHS = 8
_MOST_RELEASES = 8  # releases of all graphs after which none is captured again
_PARTS = (PackedBatch, PackedAttention, ImageSlots, Backend, KernelCall, Rows)


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` applied to each tensor in it, in a fixed order."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map(item, function) for item in value)
    if isinstance(value, _PARTS):
        new = copy.copy(value)
        vars(new).update({name: _map(item, function) for name, item in vars(value).items()})
        return new
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a micro-batch or a ``PackedAttention``, in a fixed order."""
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(value, add)
    return found


def shape_of(value: Any) -> Any:
    """A hashable key of what a graph depends on: shapes and dtypes of tensors, and all other values."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, tuple):
        return tuple(shape_of(item) for item in value)
    if isinstance(value, _PARTS):
        return type(value), tuple((name, shape_of(item)) for name, item in vars(value).items())
    return (value.start, value.stop) if isinstance(value, slice) else value


def memory_beside(taken: int) -> int:
    """Bytes that a pass without a graph could use next to graphs that hold ``taken`` bytes."""
    if not torch.cuda.is_available():
        return 0
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - taken
    return torch.cuda.mem_get_info()[0] + max(cached, 0)


class Graph:
    """Graphs of both passes over micro-batches of one shape.

    Args:
        stage: the model, wrapped; its loss is a scalar.
        batch, packed: an example of the shape, on the device; its values do not matter.
        pool: memory that all graphs share.

    Attributes:
        taken: bytes that this graph added to the pool.
    """

    def __init__(self, stage: Any, batch: PackedBatch, packed: PackedAttention, pool: Any) -> None:
        self._stage, self._arguments = stage, _map((batch, packed), torch.clone)
        self._inputs = tensors_of(self._arguments)
        self._parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        self._loss: Any = None
        self._factor = torch.ones((), dtype=torch.float32, device=batch.token_ids.device)
        self.taken = 0
        self._replays = self._capture(pool)

    def _capture(self, pool: Any) -> tuple[Callable[[], None], Callable[[], None]]:
        passes = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for graph, function in zip(passes, (self._run_forward, self._run_backward), strict=True):
            # Threads of the loader and of checkpoints may allocate during the capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                function()
        self.taken = max(torch.cuda.memory_reserved() - before, 0)
        return passes[0].replay, passes[1].replay

    def _run_forward(self) -> None:
        with torch.enable_grad():
            self._loss = self._stage(*self._arguments)

    def _run_backward(self) -> None:
        # A layer that has added its gradient to the buffer sets this mark, and returns a dummy gradient.
        for parameter in self._parameters:
            parameter.grad_added_to_main_grad = False
        gradients = torch.autograd.grad(self._loss, self._parameters, self._factor, allow_unused=True)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None and not parameter.grad_added_to_main_grad:
                parameter.main_grad.add_(gradient)

    def forward(self, batch: PackedBatch, packed: PackedAttention) -> Tensor:
        """The loss of a micro-batch of the graph's shape."""
        for held, new in zip(self._inputs, tensors_of((batch, packed)), strict=True):
            held.copy_(new, non_blocking=True)
        self._replays[0]()
        return self._loss.detach().clone()

    def backward(self, factor: Tensor) -> None:
        """Add the gradients of ``factor`` times that loss; call once, before the next micro-batch."""
        self._factor.copy_(factor)
        self._replays[1]()


class _Replayed(torch.autograd.Function):
    """A graph's loss as an autograd function, whose backward pass replays the graph's."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graph: Graph, batch: PackedBatch, packed: PackedAttention) -> Tensor:
        ctx.graph = graph
        return graph.forward(batch, packed)

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[None, ...]:
        # The losses of a step are kept; a reference from them would hold the memory of released graphs.
        graph, ctx.graph = ctx.graph, None
        graph.backward(factors[0])
        return None, None, None, None


class GraphedStage:
    """A model that replays graphs in training; call it like the model.

    Args:
        stage: the model, wrapped by DistributedDataParallel, which reduces gradients after the last micro-batch.
        kind: captures a graph; tests replace ``Graph``.

    Attributes:
        replayed, run: number of micro-batches with and without a graph.
        released: number of times that all graphs were released.
    """

    def __init__(self, stage: Any, kind: Callable[..., Graph] = Graph) -> None:
        self._stage, self._kind = stage, kind
        self._graphs: dict[Any, Graph] = {}
        self._seen: Counter[Any] = Counter()
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._anchor = torch.zeros((), device=current_device(), requires_grad=True)
        self.replayed = self.run = self.released = 0

    def __call__(self, batch: PackedBatch, packed: PackedAttention) -> Tensor:
        """The loss of a micro-batch, on the device."""
        batch = replace(batch, keys=())
        graph = self._graph(batch, packed) if torch.is_grad_enabled() and self._stage.training else None
        if graph is None:
            self.run += 1
            if torch.is_grad_enabled():
                self._make_room()
            return self._stage(batch, packed)
        self.replayed += 1
        return _Replayed.apply(self._anchor, graph, batch, packed)

    def _graph(self, batch: PackedBatch, packed: PackedAttention) -> Graph | None:
        shape = shape_of((batch, packed))
        graph = self._graphs.get(shape)
        if graph is not None:
            return graph
        self._seen[shape] += 1
        full = len(self._graphs) == _MOST_GRAPHS or self.released == _MOST_RELEASES
        if self._seen[shape] <= _WARM_UP or full:
            return None
        with contextlib.suppress(torch.OutOfMemoryError):  # its traceback holds the captured memory
            graph = self._kind(self._stage, batch, packed, self._pool)
        if graph is None:
            self._release("a capture that ran out of memory")
            return None
        self._graphs[shape] = graph
        self._tell(
            f"CUDA graph {len(self._graphs)} of at most {_MOST_GRAPHS}: {batch.num_tokens} tokens, room for "
            f"{len(batch.sample_starts)} samples and {len(batch.loss_rows)} answer rows"
        )
        return graph

    def _make_room(self) -> None:
        """Release the graphs if a pass without one does not fit next to them; it needs as much memory as they do."""
        taken = sum(graph.taken for graph in self._graphs.values())
        if not taken or memory_beside(taken) >= taken:
            return
        self._release("a micro-batch of a rare shape")

    def _release(self, reason: str) -> None:
        taken = sum(graph.taken for graph in self._graphs.values())
        self._graphs.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            # cuBLAS's workspace stays in the old pool, and torch does not capture into a pool without graphs.
            self._pool = torch.cuda.graph_pool_handle()
        self.released += 1
        then = "they will be captured again"
        if self.released == _MOST_RELEASES:
            then = "they are not captured again; a smaller train.micro_batch_size would leave room for both"
        self._tell(f"CUDA graphs released {taken / 2**30:.1f} GiB for {reason}; {then}")

    def _tell(self, text: str) -> None:
        log(f"{text} | micro-batches replayed {self.replayed} | without a graph {self.run}")
