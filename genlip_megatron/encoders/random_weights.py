"""Random weights from a fixed seed: the control that a trained model must beat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def seeded() -> Iterator[None]:
    """Draw the weights of models that are made here from seed 0, and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def randomised(model: Any) -> Any:
    """A copy of a ``transformers`` model with the initial weights of its class, from a fixed seed."""
    with seeded():
        fresh = type(model)(model.config)
    return fresh.requires_grad_(False).eval().to(model.device, model.dtype)
