"""Where weights come from: what every format offers, and how what it holds is compared with what a model needs."""

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
        model: what they are the weights of.
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
    """Names in a line, the first twenty of them.

    >>> listed(["b", "a"])
    'b, a'
    """
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def compare(where: str, found: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]], hint: str) -> None:
    """Raise ValueError unless exactly the ``needed`` tensors were ``found``, in their shapes; the line names each that
    is missing, unexpected or of another shape.

    Args:
        where: folder or file.
        found, needed: name -> shape.
        hint: what to do, the end of the message.
    """
    wrong = []
    if missing := [name for name in needed if name not in found]:
        wrong.append(f"missing: {listed(missing)}")
    if unexpected := [name for name in found if name not in needed]:
        wrong.append(f"unexpected: {listed(unexpected)}")
    shapes = [
        f"{name} is {list(found[name])}, {list(shape)} expected"
        for name, shape in needed.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if shapes:
        wrong.append(f"of another shape: {listed(shapes)}")
    if wrong:
        raise ValueError(f"{where}: its tensors are not the model's; {'; '.join(wrong)}. {hint}")


def to_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; itself when it is so already.

    Raises:
        ValueError: a finite value of it is none in ``dtype``.
    """
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if dtype == torch.float16 and (converted.isinf() & tensor.isfinite()).any():
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise ValueError(f"{name}: a value of {largest:.3g} is beyond float16, which ends at 65504; use --dtype bf16")
    return converted
