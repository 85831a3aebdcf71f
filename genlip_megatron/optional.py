"""Packages that only some tools need."""

from __future__ import annotations

import importlib.util


def need_transformers() -> None:
    """Check, without importing it, that transformers is installed.

    Raises:
        ValueError: it is not; says what to install.
    """
    try:
        found = importlib.util.find_spec("transformers") is not None
    except ValueError:  # imported, and nothing that can be found again
        found = False
    if not found:
        raise ValueError("transformers is not installed: pip install 'genlip-megatron[hf]'")
