"""Compute GPU kernels on the CPU, in the memory that driver.c hands out as a GPU's.

Under ``OnCpu`` every ATen operation with a tensor on "cuda" runs the CPU's kernel on aliases of its arguments. Views,
allocations and collectives stay on the device, so devices, streams, storages and the caching allocator behave as on a
GPU. Products of bfloat16 are summed in float32, as matrix units do. Random numbers come from the CPU generator, so
DropPath differs from a GPU's.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# The libraries of this process; under run.py they include driver.c's functions.
_LIBRARY = ctypes.CDLL(None)
# Operations that only create, describe or read memory.
_NATIVE = frozenset(
    f"aten::{name}"
    for name in (
        "_has_same_storage_numel", "_local_scalar_dense", "_pin_memory", "_reshape_alias", "_unsafe_view", "alias",
        "detach", "empty", "empty_like", "empty_strided", "is_pinned", "is_same_size", "lift_fresh", "new_empty",
        "new_empty_strided", "pin_memory", "record_stream", "resize_", "resize_as_", "set_",
    )
)  # fmt: skip


def wait_for_stream() -> None:
    """Finish the current stream's queued work, so that other ranks' parts of its collectives arrive."""
    _LIBRARY.null_gpu_finish(ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))


def cpu_alias(tensor: Tensor) -> Tensor:
    """A CPU tensor on the memory of ``tensor``, which must outlive it."""
    if tensor.device.type != "cuda":
        return tensor
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    same = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(same, tensor.storage_offset(), tensor.size(), tensor.stride())


def attention(
    query: Tensor, key: Tensor, value: Tensor, pieces: Iterable[tuple[slice, slice]], causal_offset: str, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention within pieces, in float32: (output [Q, H, D], log of the normalisers [H, Q]).

    Args:
        query: [Q, H, D].
        key, value: [K, H, D].
        pieces: (query rows, key rows that they may see) of each piece.
        causal_offset: "" for all keys; "top_left": row i sees keys up to i; "bottom_right": the last row sees all.
        scale: of the scores.

    Rows in no piece are NaN and must not be read.

        >>> x = torch.tensor([[[0.0]], [[1.0]]])
        >>> attention(x, x, x, [(slice(0, 2), slice(0, 2))], "bottom_right", 1.0)[0].flatten().tolist()
        [0.0, 0.7310585975646973]
    """
    query, key, value = query.float(), key.float(), value.float()
    output = torch.full_like(query, float("nan"))
    normaliser = torch.full(query.shape[1::-1], float("nan"))
    for rows, keys in pieces:
        scores = _scores(query[rows], key[keys], causal_offset, scale)
        output[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value[keys])
        normaliser[:, rows] = scores.logsumexp(dim=-1)
    return output, normaliser


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Iterable[tuple[slice, slice]],
    causal_offset: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 gradients of ``query``, ``key`` and ``value`` through ``attention``; zeros for rows in no piece."""
    grad_output, query, key, value = (x.float() for x in (grad_output, query, key, value))
    grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
    for rows, keys in pieces:
        weights = _scores(query[rows], key[keys], causal_offset, scale).softmax(dim=-1)
        grad_value[keys] += torch.einsum("hqk,qhd->khd", weights, grad_output[rows])
        grad_weights = torch.einsum("qhd,khd->hqk", grad_output[rows], value[keys])
        grad_scores = scale * weights * (grad_weights - (grad_weights * weights).sum(dim=-1, keepdim=True))
        grad_query[rows] += torch.einsum("hqk,khd->qhd", grad_scores, key[keys])
        grad_key[keys] += torch.einsum("hqk,qhd->khd", grad_scores, query[rows])
    return grad_query, grad_key, grad_value


def _scores(query: Tensor, key: Tensor, causal_offset: str, scale: float) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if not causal_offset:
        return scores
    queries, keys = scores.shape[1:]
    first_hidden = 1 + (keys - queries if causal_offset == "bottom_right" else 0)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(first_hidden)
    return scores.masked_fill(hidden, float("-inf"))


def pieces_of(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    """Rows and keys of each sequence of a pack, from the sequences' ends, int32 [N + 1] each."""
    rows, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [(slice(*rows[i : i + 2]), slice(*keys[i : i + 2])) for i in range(len(rows) - 1)]


def _causal(is_causal: bool, window_size: Any) -> str:
    window = (-1, -1) if window_size is None else tuple(window_size)
    if window not in ((-1, -1), (-1, 0)):
        raise NotImplementedError(
            f"varlen attention with window_size {window} is not computed on the null GPU, (-1, -1) and (-1, 0) are: "
            f"leave out --compute, or add it to {__file__}"
        )
    return "bottom_right" if is_causal or window == (-1, 0) else ""


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch_attn::_varlen_attn: (output, log of the normalisers, random state)."""
    output, normaliser = attention(
        query, key, value, pieces_of(cu_seqlens_q, cu_seqlens_k), _causal(is_causal, window_size),
        query.shape[-1] ** -0.5 if scale is None else scale,
    )  # fmt: skip
    return output.to(query.dtype), normaliser, torch.zeros(2, dtype=torch.uint64)


def _varlen_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normaliser: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    random_state: Tensor | None = None,
    scale: float | None = None,
    window_size: Any = None,
) -> tuple[Tensor, ...]:
    """torch_attn::_varlen_attn_backward: gradients of query, key and value."""
    gradients = attention_backward(
        grad_output, query, key, value, pieces_of(cu_seqlens_q, cu_seqlens_k), _causal(is_causal, window_size),
        query.shape[-1] ** -0.5 if scale is None else scale,
    )  # fmt: skip
    return tuple(gradient.to(query.dtype) for gradient in gradients)


def _summed_in_float32(operation: Any) -> Callable[..., Tensor]:
    """``operation`` with bfloat16 arguments multiplied and summed in float32; the result is rounded once."""

    def compute(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        dtype = args[0].dtype
        if dtype == torch.bfloat16:
            args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
        result = operation(*args, **kwargs).to(dtype)
        return result if out is None else out.copy_(result)

    return compute


def _mm_to(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    result = (a.float() @ b.float()).to(dtype)
    return result if out is None else out.copy_(result)


def _addmm_to(
    x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    result = (beta * x.float() + alpha * (a.float() @ b.float())).to(dtype)
    return result if out is None else out.copy_(result)


# Operations that the CPU lacks, or rounds more often than a GPU.
_OWN: dict[str, Callable[..., Any]] = {
    **{
        f"aten::{name}.{overload}": _summed_in_float32(getattr(torch.ops.aten, name))
        for name in ("mm", "addmm", "bmm", "baddbmm")
        for overload in ("default", "out")
    },
    **{f"aten::mm.{overload}": _mm_to for overload in ("dtype", "dtype_out")},
    **{f"aten::addmm.{overload}": _addmm_to for overload in ("dtype", "dtype_out")},
    "torch_attn::_varlen_attn.default": _varlen_attention,
    "torch_attn::_varlen_attn_backward.default": _varlen_attention_backward,
}


def _dispatches_itself(x: Any) -> bool:
    plain = (Tensor, torch.nn.Parameter)
    return (
        isinstance(x, Tensor) and type(x) not in plain and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


class OnCpu(TorchDispatchMode):
    """Compute operations on "cuda" with the CPU's kernels, and count them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(x, FakeTensor) for x in leaves):
            return func(*args, **kwargs)  # only shapes
        if any(_dispatches_itself(x) for x in leaves):
            return NotImplemented
        asked = kwargs.get("device")
        devices = [x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda]
        device = torch.device(asked) if asked is not None else devices[0] if devices else torch.device("cpu")
        name = func._schema.name
        on_gpu = bool(devices) or device.type == "cuda"
        # In inference mode composite operations arrive undivided; they may return views or copies.
        if on_gpu and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        if not on_gpu or name in _NATIVE or name.startswith("c10d") or func.is_view:
            return func(*args, **kwargs)
        self.calls[name] += 1
        wait_for_stream()
        # Keeps the aliases until the results are known, to recognise a returned argument by its identity.
        origin: dict[int, tuple[Tensor, Tensor]] = {}

        def to_cpu(x: Any) -> Any:
            if isinstance(x, Tensor):
                alias = cpu_alias(x)
                origin[id(alias)] = (x, alias)
                return alias
            if isinstance(x, torch.device):
                return torch.device("cpu")
            return None if isinstance(x, torch.Generator) else x

        def to_device(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in origin:
                return origin[id(x)][0]
            if device.type != "cuda":
                return x
            result = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
            if x.numel():
                cpu_alias(result).copy_(x)
            return result

        cpu_args, cpu_kwargs = tree_map(to_cpu, (args, kwargs))
        if cpu_kwargs.get("pin_memory"):
            cpu_kwargs["pin_memory"] = False
        compute = _OWN.get(f"{name}.{func._overloadname}", func)
        return tree_map(to_device, compute(*cpu_args, **cpu_kwargs))


@contextlib.contextmanager
def computing(interpret: bool) -> Iterator[OnCpu]:
    """Compute on the CPU; the head's cross entropy in Triton's interpreter or, much faster, in torch."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not interpret:
        from genlip_megatron.model import cross_entropy

        cross_entropy._in_place = cross_entropy._plain
    with OnCpu() as mode:
        yield mode
