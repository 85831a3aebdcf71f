"""Every patch of torch, Megatron-Core and the C library in this project.

Call ``install`` before the first import of a ``megatron.core`` module that touches devices. A further thread that runs
Megatron-Core code must enter ``device_mode``, because torch keeps function modes per thread.

Each entry says what is patched, why, and which Megatron-Core version does not need it. The pinned version is 0.16.1;
0.20.0 was read for this table.

With and without a GPU:

* CUDA_DEVICE_MAX_CONNECTIONS=1. Megatron-Core overlaps tensor-parallel communication correctly only if the GPU starts
  kernels in the order of their launch. Needed by every version on Hopper and older GPUs.
* Warnings are hidden. Megatron-Core warns about missing Transformer Engine and Apex, which are optional here, and calls
  deprecated torch functions. Needed until it stops.
* "Unknown MLP type" is not logged. ``TransformerLayer`` hands the tensor-parallel group only to its own MLP classes and
  warns about others. Our MLP takes the default group, which is the same. Not needed by 0.20.0.
* ``count_steps_per_group`` replaces torch's AdamW. ``DistributedOptimizer`` restores one step tensor for all
  parameters, which then advances once per parameter: after a resume the bias correction is wrong, without an error.
  0.20.0 still needs it.

Without a GPU only. Megatron-Core is written for CUDA devices, but its algorithms need none:

* ``torch.cuda`` functions, streams, events, random states and tensor types act on the CPU. Every version needs it.
* ``_CudaMeansCpu`` maps ``device="cuda"``, ``.cuda()`` and CUDA type names to the CPU. Every version needs it.
* ``torch.cuda._lazy_call`` runs at once. ``tensor_parallel/random.py`` queues changes of random states until CUDA
  starts, which never happens. 0.20.0 still needs it.
* ``transformer_engine`` and ``amp_C`` cannot be imported. Megatron-Core uses their kernels if it can import them, and
  they run only on GPUs. Every version needs it.
* ``all_gather_into_tensor`` and ``reduce_scatter_tensor`` copy once in a group of one rank. gloo copies several times.
  Needed until torch's gloo backend does not.
* ``torch.compile`` is off while ``megatron.core.jit`` is imported. The module compiles at import, which needs a C++
  compiler and takes seconds; its own switch comes too late. 0.20.0 still needs it.
* glibc keeps freed memory. By default it returns the large buffers of each micro-batch to the system, and getting them
  back costs a page fault per 4 KiB. Every version needs it.

Workarounds inside a subclass or around a call stay there, each with its reason: ``model/attention/core.py`` (the output
gate is copied when attention is offloaded), ``train/forward_backward.py`` (``finalize_model_grads`` waits for the
device), ``model/weights.py`` (marks of sharded parameters), ``checkpoint/loading.py`` (``no_grad``; optimizer
settings), ``checkpoint/parts.py`` (padding in optimizer state).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

SUPPORTED_MEGATRON_CORE = "0.16.1"

_CPU = torch.device("cpu")
_installed = False


class _Idle:
    """Stands in for ``torch.cuda.Stream`` and ``torch.cuda.Event``: CPU work is synchronous, so nothing waits."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    record = wait = wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _Idle()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class _Generators:
    """``torch.cuda.default_generators``; every index gives the CPU's generator."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Replaces ``device="cuda"``, ``.cuda()`` and CUDA type names by their CPU counterparts."""

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


def device_mode() -> contextlib.AbstractContextManager[Any]:
    """Inside the block ``"cuda"`` means the CPU in this thread if there is no GPU."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


def _nothing() -> Callable[..., None]:
    """A new function that does nothing. torch's compiler refuses the same object under two names."""
    return lambda *args, **kwargs: None


def _within_one_rank(collective: Callable) -> Callable:
    """``collective`` (output, input, ...) with at most one copy in a group of one rank."""

    def call(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if torch.distributed.get_world_size(group) > 1:
            return collective(output, input, *args, **kwargs)
        if output.data_ptr() != input.data_ptr():
            output.copy_(input.view_as(output))
        return _Work() if kwargs.get("async_op") else None

    return call


class _Work:
    """The handle of a finished collective."""

    def wait(self, timeout: Any = None) -> bool:
        return True


def _keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it to the system. Other C libraries keep their default."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 * 2**20)  # glibc's maximum
        mallopt(trim_threshold, 2**31 - 1)


def _is_wanted(record: logging.LogRecord) -> bool:
    return "Unknown MLP type" not in record.getMessage()


def count_steps_per_group(adam: type[torch.optim.Optimizer]) -> None:
    """Make Megatron-Core use ``adam`` in place of torch's AdamW; with Transformer Engine or Apex do nothing.

    Args:
        adam: takes the arguments of Apex's FusedAdam and counts steps per parameter group.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer.Adam = distrib_optimizer.Adam = adam  # type: ignore[misc, assignment]
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def install() -> None:
    """Make Megatron-Core run in this process, with or without a GPU. Calling it again does nothing.

    Raises:
        RuntimeError: no GPU, and a megatron-core version whose CUDA calls are not mapped here.
    """
    global _installed
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # read when CUDA starts
    # Adding the same filter again does nothing.
    logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(_is_wanted)
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
            f"megatron-core {found} without CUDA: only {SUPPORTED_MEGATRON_CORE} runs on CPUs. Run "
            f"pip install megatron-core=={SUPPORTED_MEGATRON_CORE}, or use a machine with a GPU."
        )

    for name in ("transformer_engine", "amp_C"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]

    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "set_device": _nothing(),
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "ipc_collect": _nothing(),
        "Stream": _Idle,
        "Event": _Idle,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: _Idle(),
        "default_stream": lambda device=None: _Idle(),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "default_generators": _Generators(),
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

    # The switch is in the module that compiles at import.
    compile_function = torch.compile
    torch.compile = lambda function=None, **kwargs: function  # type: ignore[assignment, misc]
    try:
        from megatron.core import jit

        jit.disable_jit_fuser()
    finally:
        torch.compile = compile_function  # type: ignore[misc]
    _keep_freed_memory()
    _CudaMeansCpu().__enter__()
    _installed = True
