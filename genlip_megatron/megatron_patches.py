"""Megatron-Core on a machine without CUDA, and nothing else.

Megatron-Core 0.16.1 is written for CUDA devices, but its algorithms need none. Where there is no GPU,
``install`` points its direct CUDA calls at their CPU meaning: the current device is the CPU, streams and events do
nothing (CPU work is synchronous), CUDA random states are the CPU generator's. Call it before the first import of a
``megatron.core`` module that touches devices; ``device_mode`` must also be entered in every further thread that
runs Megatron-Core code, because torch keeps function modes per thread.

With a GPU this module does nothing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from genlip_megatron.device import keep_freed_memory

SUPPORTED_MEGATRON_CORE = "0.16.1"

_CPU = torch.device("cpu")
_installed = False


class _Stream:
    """A stand-in for ``torch.cuda.Stream``: CPU work is synchronous, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event:
    """A stand-in for ``torch.cuda.Event``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class _Generators:
    """``torch.cuda.default_generators`` indexed by anything: there is one generator, the CPU's."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Turns ``device="cuda"``, ``.cuda()`` and CUDA type names into their CPU counterparts."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


@contextlib.contextmanager
def device_mode() -> Iterator[None]:
    """Within it, this thread's ``"cuda"`` means the CPU where there is no GPU."""
    if torch.cuda.is_available():
        yield
    else:
        with _CudaMeansCpu():
            yield


def _nothing() -> Callable[..., None]:
    """A new function that does nothing; torch's compiler refuses one object under two names."""
    return lambda *args, **kwargs: None


def _within_one_rank(collective: Callable) -> Callable:
    """``collective`` (output, input, ...), which gloo would carry out by several copies even in a group of one rank."""

    def call(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if torch.distributed.get_world_size(group) > 1:
            return collective(output, input, *args, **kwargs)
        if output.data_ptr() != input.data_ptr():
            output.copy_(input.view_as(output))
        return _Work() if kwargs.get("async_op") else None

    return call


class _Work:
    """The handle of a collective that is already done."""

    def wait(self, timeout: Any = None) -> bool:
        return True


def install() -> None:
    """Make Megatron-Core run in this process, with or without a GPU. Calling it again does nothing.

    Raises:
        RuntimeError: no GPU, and a version of megatron-core whose CUDA calls have not been mapped.
    """
    global _installed
    # Overlap of tensor-parallel communication with compute relies on one hardware queue; set before CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # What Megatron-Core falls back to without these optional packages is this project's tested default.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|nvrx|flash).*not installed.*")
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*Falling back.*")
    for message in (
        "full scope is deprecated",
        r"The \.grad attribute of a Tensor that is not a leaf",
        r"`torch\.distributed\.\w+_tensor` is deprecated",
        "`load_state_dict` is deprecated",
        "Please use DTensor instead",
    ):
        warnings.filterwarnings("ignore", message=message)
    if _installed or torch.cuda.is_available():
        return
    found = importlib.metadata.version("megatron-core")
    if found != SUPPORTED_MEGATRON_CORE:
        raise RuntimeError(
            f"megatron-core {found} without CUDA: only {SUPPORTED_MEGATRON_CORE} is mapped to the CPU; "
            f"pip install megatron-core=={SUPPORTED_MEGATRON_CORE}, or run on a machine with a GPU"
        )

    # Megatron-Core takes the kernels of these wherever they can be imported, and they run on GPUs alone.
    for name in ("transformer_engine", "amp_C"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]

    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "set_device": _nothing(),
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "ipc_collect": _nothing(),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "default_generators": _Generators(),
        # Megatron-Core's random tracker sets its states through lazy calls, which would queue for ever.
        "_lazy_call": lambda call, **kwargs: call(),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(torch.distributed, name, _within_one_rank(getattr(torch.distributed, name)))
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.cuda.nvtx.range_push = _nothing()
    torch.cuda.nvtx.range_pop = _nothing()
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"):
        setattr(torch.cuda, name, getattr(torch, name))

    # Megatron-Core compiles small functions at import, which needs a C++ compiler and seconds of start-up. Its own
    # switch sits behind that import.
    compile_function = torch.compile
    torch.compile = lambda function=None, **kwargs: function  # type: ignore[assignment, misc]
    try:
        from megatron.core import jit

        jit.disable_jit_fuser()
    finally:
        torch.compile = compile_function  # type: ignore[misc]
    keep_freed_memory()
    _CudaMeansCpu().__enter__()
    _installed = True
