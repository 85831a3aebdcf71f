"""The interface of a source of weights, and the check that it holds exactly the tensors of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from genlip_megatron.config import ModelConfig
from genlip_megatron.model.state_dict import ModelParameter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LISTED = 20


class Source(Protocol):
    """Weights that are read one parameter at a time.

    Attributes:
        model: the model of the weights.
    """

    model: ModelConfig

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Canonical name -> dtype, of every tensor."""
        ...

    def read(self, parameter: ModelParameter) -> list[Tensor]:
        """The full canonical tensors of a parameter, in its order, on the CPU; perhaps views into a mapped file."""
        ...


def listed(names: Iterable[str]) -> str:
    """The first twenty names, in one line.

    >>> listed(["b", "a"])
    'b, a'
    """
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def compare(where: str, found: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]], hint: str) -> None:
    """Raise ValueError unless ``found`` equals ``needed``; the error names each missing, unexpected and misshapen
    tensor.

    Args:
        where: folder or file.
        found, needed: name -> shape.
        hint: what to do; ends the error.
    """
    wrong = {
        "missing": [name for name in needed if name not in found],
        "unexpected": [name for name in found if name not in needed],
        "wrong shape": [
            f"{name} is {list(found[name])}, expected {list(shape)}"
            for name, shape in needed.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    if any(wrong.values()):
        said = "; ".join(f"{kind}: {listed(names)}" for kind, names in wrong.items() if names)
        raise ValueError(f"{where}: its tensors do not match the model: {said}. {hint}")


def to_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; not copied if it has that dtype.

    Raises:
        ValueError: a finite value overflows ``dtype``.
    """
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if dtype == torch.float16 and (converted.isinf() & tensor.isfinite()).any():
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise ValueError(
            f"{name}: a value of {largest:.3g} overflows float16, whose largest is 65504. Use --dtype bf16"
        )
    return converted
