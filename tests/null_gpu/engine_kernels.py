"""Compute Transformer Engine's compiled functions on the CPU, in the memory that driver.c hands out.

Each function of ``transformer_engine_torch`` is replaced by one that first calls the compiled function and then writes
the values. The compiled function makes its checks and returns results of the right shapes and types, but its kernels do
nothing. The values follow this project's reading of Transformer Engine 2.11; its Python code (recipes, scales, modules)
is used unchanged. Fused attention's compiled functions need a real cuDNN, so their results are allocated here.

Call ``install`` before other modules import the functions by name. Without ``compute`` it only replaces fused
attention by allocations, so that peak memory is that of a GPU.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.null_gpu.kernels import attention, attention_backward, cpu_alias, pieces_of, wait_for_stream

# Number of calls of each function.
CALLS: Counter[str] = Counter()

_Computing = Callable[..., Any]
_FUNCTIONS: dict[str, _Computing] = {}
# The compiled functions, by name.
_NATIVE: dict[str, Any] = {}


def _stands_for(name: str) -> Callable[[_Computing], _Computing]:
    """Decorator: the function replaces ``name`` and gets the compiled function as its first argument."""

    def register(function: _Computing) -> _Computing:
        _FUNCTIONS[name] = function
        return function

    return register


def install(compute: bool) -> None:
    """Replace Transformer Engine's functions in all of its modules."""
    importlib.import_module("transformer_engine.pytorch")
    compiled = importlib.import_module("transformer_engine_torch")
    _NATIVE.update({name: getattr(compiled, name) for name in _FUNCTIONS})
    replaced: dict[int, _Computing] = {}
    for name, function in _FUNCTIONS.items():
        if compute or name.startswith("fused_attn"):
            replaced[id(_NATIVE[name])] = _counted(name, function, compute)
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("transformer_engine")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])


def _not_computed(what: str) -> NotImplementedError:
    return NotImplementedError(f"{what} is not computed on the null GPU: leave out --compute, or add it to {__file__}")


def _counted(name: str, function: _Computing, compute: bool) -> _Computing:
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        if compute:
            wait_for_stream()
        return function(_NATIVE[name], *args, **kwargs) if compute else _ALLOCATING[name](*args)

    return call


def float8(dtype: Any) -> torch.dtype:
    """torch's dtype for one of Transformer Engine's 8-bit ``DType``."""
    return {"kFloat8E4M3": torch.float8_e4m3fn, "kFloat8E5M2": torch.float8_e5m2}[dtype.name]


def round_to_float8(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8, the bytes of ``values`` times ``scale`` in ``dtype``, clamped to its range.

    >>> rounded = round_to_float8(torch.tensor([1.0, 1.06, 500.0]), torch.tensor(1.0), torch.float8_e4m3fn)
    >>> rounded.view(torch.float8_e4m3fn).tolist()
    [1.0, 1.0, 448.0]
    """
    top = torch.finfo(dtype).max
    return (values.float() * scale).clamp(-top, top).to(dtype).view(torch.uint8)


def _is_float8(x: Any) -> bool:
    return hasattr(x, "_scale_inv")


def _values(x: Any) -> Tensor:
    """A tensor's values, in float32 for an FP8 tensor, which may hold only its transpose."""
    if not _is_float8(x):
        return cpu_alias(x.detach())
    dtype, inverse = float8(x._fp8_dtype), cpu_alias(x._scale_inv)
    if x._data is not None:
        return cpu_alias(x._data).view(dtype).float() * inverse
    transposed = cpu_alias(x._transpose).view(dtype).float() * inverse
    return transposed.reshape(len(transposed), -1).t().contiguous()


def _rows(x: Any) -> Tensor:
    """float32 [N, D], with all dimensions but the last flattened."""
    values = _values(x).float()
    return values.reshape(-1, values.shape[-1])


def _write(x: Any, values: Tensor, quantizer: Any = None) -> None:
    """Write ``values`` into a tensor, or scaled by ``quantizer`` into an FP8 tensor and its transpose."""
    if x is None:
        return
    if not _is_float8(x):
        cpu_alias(x.detach()).copy_(values.reshape(x.shape))
        return
    dtype, largest = float8(quantizer.dtype), values.float().abs().max()
    if "CurrentScaling" in type(quantizer).__name__:
        scale = torch.where(largest > 0, torch.finfo(dtype).max / largest, 1.0).reshape(1)
    else:
        seen = cpu_alias(quantizer.amax)
        seen.copy_(torch.maximum(seen, largest))
        scale = cpu_alias(quantizer.scale)
    cpu_alias(x._scale_inv).copy_(1 / scale)
    rounded = round_to_float8(values, scale, dtype)
    if x._data is not None:
        cpu_alias(x._data).copy_(rounded.reshape(x._data.shape))
    if x._transpose is not None:
        cpu_alias(x._transpose).copy_(rounded.reshape(-1, rounded.shape[-1]).t().reshape(x._transpose.shape))
        x._transpose_invalid = False


# Casts


@_stands_for("quantize")
def _quantize(native: Any, x: Any, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    result = native(x, quantizer, output, noop)
    _write(result, _values(x), quantizer)
    return result


@_stands_for("dequantize")
def _dequantize(native: Any, x: Any, dtype: Any) -> Tensor:
    result = native(x, dtype)
    _write(result, _values(x))
    return result


@_stands_for("bgrad_quantize")
def _bgrad_quantize(native: Any, x: Any, quantizer: Any) -> list[Any]:
    bias_gradient, result = native(x, quantizer)
    _write(bias_gradient, _rows(x).sum(dim=0))
    _write(result, _values(x), quantizer)
    return [bias_gradient, result]


@_stands_for("fp8_transpose")
def _fp8_transpose(native: Any, data: Tensor, dtype: Any, out: Any = None) -> Tensor:
    result = native(data, dtype, out=out)
    bytes_ = cpu_alias(data)
    _write(result, bytes_.reshape(-1, bytes_.shape[-1]).t())
    return result


@_stands_for("compute_amax")
def _compute_amax(native: Any, x: Tensor, amax: Tensor) -> None:
    _write(amax, _values(x).float().abs().max())


@_stands_for("fused_amax_and_scale_update_after_reduction")
def _update_scales(
    native: Any, reduced: Tensor, histories: Any, scales: Any, algorithm: str, dtype: Any, margin: float
) -> None:
    """Write the amaxes of all ranks to the head of each history [L, T], set scales [T] from it, and shift it by one."""
    top = torch.finfo(float8(dtype)).max
    parts = cpu_alias(reduced).split([history.shape[1] for history in histories])
    for part, history, scale in zip(parts, map(cpu_alias, histories), map(cpu_alias, scales), strict=True):
        history[0] = part
        amax = history.amax(dim=0) if algorithm == "max" else history[0].clone()
        history.copy_(history.roll(-1, dims=0))
        history[0] = 0
        new = top / amax / 2**margin
        scale.copy_(torch.where((amax > 0) & new.isfinite(), new, scale))


@_stands_for("multi_tensor_compute_scale_and_scale_inv")
def _compute_scales(
    native: Any, chunk: int, overflow: Tensor, lists: Any, top: float, power_of_two: bool, epsilon: float, *rest: Any
) -> None:
    if power_of_two:
        raise _not_computed("scaling by powers of two")
    for amax, scale, inverse in zip(*lists, strict=True):
        largest = cpu_alias(amax).float()
        value = torch.where(largest > 0, top / largest.clamp(min=epsilon), 1.0)
        _write(scale, value)
        _write(inverse, 1 / value)


# Layers


@_stands_for("layernorm_fwd")
def _layernorm(
    native: Any, x: Any, weight: Tensor, bias: Any, epsilon: float, output: Any, quantizer: Any, dtype: Any,
    sm_margin: int, zero_centered: bool,
) -> list[Any]:  # fmt: skip
    result, mean, inverse_deviation = native(
        x, weight, bias, epsilon, output, quantizer, dtype, sm_margin, zero_centered
    )
    values = _rows(x)
    variance, average = torch.var_mean(values, dim=-1, correction=0, keepdim=True)
    inverse = (variance + epsilon).rsqrt()
    normed = (values - average) * inverse * (_values(weight).float() + zero_centered)
    if bias is not None:
        normed = normed + _values(bias).float()
    # With current scaling the norm's result is rounded before its maximum is taken.
    if not _is_float8(result) or "CurrentScaling" in type(quantizer).__name__:
        normed = normed.to(weight.dtype)
    _write(result, normed, quantizer)
    _write(mean, average)
    _write(inverse_deviation, inverse)
    return [result, mean, inverse_deviation]


@_stands_for("layernorm_bwd")
def _layernorm_backward(
    native: Any, grad_output: Any, x: Any, mean: Tensor, inverse_deviation: Tensor, weight: Tensor, sm_margin: int,
    zero_centered: bool,
) -> list[Any]:  # fmt: skip
    results = native(grad_output, x, mean, inverse_deviation, weight, sm_margin, zero_centered)
    gradient, inverse = _rows(grad_output), cpu_alias(inverse_deviation).reshape(-1, 1)
    normed = (_rows(x) - cpu_alias(mean).reshape(-1, 1)) * inverse
    inner = gradient * (_values(weight).float() + zero_centered)
    grad_x = inverse * (inner - inner.mean(-1, keepdim=True) - normed * (inner * normed).mean(-1, keepdim=True))
    for result, value in zip(results, (grad_x, (gradient * normed).sum(dim=0), gradient.sum(dim=0)), strict=True):
        _write(result, value)
    return list(results)


@_stands_for("generic_gemm")
def _gemm(
    native: Any, a: Any, transpose_a: bool, b: Any, transpose_b: bool, output: Any, quantizer: Any, dtype: Any,
    bias: Any, bias_dtype: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Tensor, workspace_size: int,
    accumulate: bool, split_accumulator: bool, **more: Any,
) -> list[Any]:  # fmt: skip
    """op(b) op(a) in row-major order, cuBLAS's op(a) op(b); adds a bias, or with ``grad`` gives its gradient."""
    results = native(
        a, transpose_a, b, transpose_b, output, quantizer, dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace,
        workspace_size, accumulate, split_accumulator, **more,
    )  # fmt: skip
    if gelu:
        raise _not_computed("a product with GELU behind it")
    left, right = _rows(b), _rows(a)
    product = (left.t() if transpose_b else left) @ (right.t() if transpose_a else right)
    if bias is not None and not grad:
        product = product + _values(bias).float()
    if accumulate:
        product = product + _values(results[0]).float().reshape(product.shape)
    _write(results[0], product, quantizer)
    if grad and isinstance(results[1], Tensor) and results[1].numel():
        _write(results[1], left.sum(dim=0))
    return list(results)


# Attention


def _layout(layout: Any) -> str:
    formats = {"NVTE_THD_THD_THD": "thd", "NVTE_BSHD_BSHD_BSHD": "bshd"}
    if layout.name not in formats:
        raise _not_computed(f"fused attention of {layout.name} (only of {', '.join(formats)})")
    return formats[layout.name]


def _causal_offset(mask: Any) -> str:
    return "" if "CAUSAL" not in mask.name else "bottom_right" if "BOTTOM_RIGHT" in mask.name else "top_left"


def _pieces(layout: Any, query: Any, key: Any, cu_q: Tensor, cu_k: Tensor, cu_q_padded: Any, cu_k_padded: Any) -> Any:
    """Rows and keys of each sequence, in tensors [T, H, D]."""
    if _layout(layout) == "bshd":
        batch, rows = query.shape[:2]
        keys = key.shape[1]
        return [(slice(i * rows, (i + 1) * rows), slice(i * keys, (i + 1) * keys)) for i in range(batch)]
    lengths = pieces_of(cpu_alias(cu_q), cpu_alias(cu_k))
    starts = pieces_of(
        cpu_alias(cu_q if cu_q_padded is None else cu_q_padded), cpu_alias(cu_k if cu_k_padded is None else cu_k_padded)
    )

    def moved(piece: slice, to: slice) -> slice:
        return slice(to.start, to.start + piece.stop - piece.start)

    return [tuple(map(moved, piece, to)) for piece, to in zip(lengths, starts, strict=True)]


def _device(x: Any) -> torch.device:
    return torch.device((x._data if _is_float8(x) else x).device)


def _allocate(x: Any, dtype: torch.dtype, quantizer: Any) -> Any:
    """An uninitialised tensor of the shape of ``x``, in FP8 with ``quantizer``."""
    result = torch.empty(tuple(x.shape), dtype=dtype, device=_device(x))
    if quantizer is None:
        return result
    # The compiled function: uninitialised values have no amax.
    return _NATIVE["quantize"](result, quantizer, None, None)


def _flat(x: Any) -> Tensor:
    """float32 [T, H, D]."""
    values = _values(x).float()
    return values.reshape(-1, *values.shape[-2:])


def _allocated_attention(*args: Any) -> list[Any]:
    """The results of ``fused_attn_fwd``: output, statistics of the softmax (two in FP8), random state."""
    query, dtype, quantizer = args[13], args[16], args[22]
    statistics = torch.empty((*query.shape[:-1], 1), dtype=torch.float32, device=_device(query))
    state = torch.empty(2, dtype=torch.int64, device=statistics.device)
    more = [torch.empty_like(statistics)] if _is_float8(query) else []
    return [_allocate(query, dtype, quantizer), statistics, *more, state]


def _allocated_attention_backward(*args: Any) -> list[Any]:
    """The results of ``fused_attn_bwd``: gradients of query, key and value, of a bias and of the softmax's offset."""
    return [*(_allocate(x, args[18], args[25]) for x in args[13:16]), None, None]


_ALLOCATING: dict[str, _Computing] = {
    "fused_attn_fwd": _allocated_attention,
    "fused_attn_bwd": _allocated_attention_backward,
}


@_stands_for("fused_attn_fwd")
def _attention(native: Any, *args: Any) -> list[Any]:
    longest_q, longest_k, _, scale, dropout, zero_fill, layout, _, mask, _, window, cu_q, cu_k = args[:13]
    query, key, value, _, cu_q_padded, cu_k_padded = args[13:19]
    softmax_quantizer, quantizer = args[21:23]
    _check_attention(dropout, window, mask)
    pieces = _pieces(layout, query, key, cu_q, cu_k, cu_q_padded, cu_k_padded)
    if any(rows.stop - rows.start > longest_q or keys.stop - keys.start > longest_k for rows, keys in pieces):
        raise ValueError(
            f"fused attention: a sequence is longer than max_seqlen, {longest_q} queries, {longest_k} keys"
        )
    output, _ = attention(_flat(query), _flat(key), _flat(value), pieces, _causal_offset(mask), scale)
    results = _allocated_attention(*args)
    _write(results[0], (output.nan_to_num() if zero_fill else output).reshape(tuple(query.shape)), quantizer)
    _note_one(softmax_quantizer)
    return results


@_stands_for("fused_attn_bwd")
def _attention_backward(native: Any, *args: Any) -> list[Any]:
    _, _, scale, dropout, _, layout, _, mask, _, window, _, cu_q, cu_k, query, key, value, _, grad_output = args[:18]
    cu_q_padded, cu_k_padded, _, probability_quantizer, quantizer = args[21:26]
    _check_attention(dropout, window, mask)
    pieces = _pieces(layout, query, key, cu_q, cu_k, cu_q_padded, cu_k_padded)
    gradients = attention_backward(
        _flat(grad_output), _flat(query), _flat(key), _flat(value), pieces, _causal_offset(mask), scale
    )
    results = _allocated_attention_backward(*args)
    for result, gradient in zip(results, gradients, strict=False):
        _write(result, gradient.reshape(tuple(result.shape)), quantizer)
    _note_one(probability_quantizer)
    return results


def _check_attention(dropout: float, window: Any, mask: Any) -> None:
    if dropout or tuple(window) != ((-1, 0) if "CAUSAL" in mask.name else (-1, -1)):
        raise _not_computed(f"fused attention with dropout {dropout}, window {tuple(window)}, {mask.name}")


def _note_one(quantizer: Any) -> None:
    """Record an amax of 1 for attention's inner matrices, which are not rounded here and have values up to about 1."""
    if quantizer is not None:
        cpu_alias(quantizer.amax).fill_(1)


# Optimizer


@_stands_for("multi_tensor_l2norm")
def _l2norm(native: Any, chunk: int, overflow: Tensor, lists: Any, per_tensor: bool = False, *rest: Any) -> Any:
    results = native(chunk, overflow, lists, per_tensor, *rest)
    norms = torch.stack([_values(x).float().norm() for x in lists[0]])
    _write(results[0], norms.norm())
    if per_tensor:
        _write(results[1], norms)
    return results


@_stands_for("multi_tensor_scale")
def _scale(native: Any, chunk: int, overflow: Tensor, lists: Any, factor: float, *rest: Any) -> None:
    for source, target in zip(*lists, strict=True):
        _write(target, _values(source).float() * float(factor))


@_stands_for("multi_tensor_adam")
def _adam(
    native: Any, chunk: int, overflow: Tensor, lists: Any, rate: float, beta1: float, beta2: float, epsilon: float,
    step: int, mode: int, bias_correction: bool, weight_decay: float,
) -> None:  # fmt: skip
    """Adam over lists of gradients, parameters, first and second moments and, for 16-bit parameters, float32 copies."""
    first_correction, second_correction = (1 - beta**step if bias_correction else 1.0 for beta in (beta1, beta2))
    for tensors in zip(*lists, strict=True):
        gradient, parameter, first, second, *masters = (cpu_alias(x.detach()) for x in tensors)
        master = masters[0] if masters else parameter
        gradient, weight = gradient.float(), master.float()
        if mode == 0:  # weight decay in the gradient (Adam) or separate (AdamW)
            gradient = gradient + weight_decay * weight
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (first / first_correction) / ((second / second_correction).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * weight
        master.copy_(weight - rate * update)
        if masters:
            parameter.copy_(master)
