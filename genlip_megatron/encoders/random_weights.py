"""A model with random weights of the same shape: the control that a trained one must beat."""

from __future__ import annotations

from typing import Any

import torch

SEED = 0


def randomised(model: Any) -> Any:
    """A copy of a ``transformers`` model with the initial weights of its class, from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        fresh = type(model)(model.config)
    return fresh.requires_grad_(False).eval().to(model.device, model.dtype)
