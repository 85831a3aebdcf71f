"""Packages that only some tools need."""

from __future__ import annotations

import importlib.util


def need_transformers() -> None:
    """Check that transformers is installed, without importing it.

    Raises:
        ValueError: it is not.
    """
    try:
        found = importlib.util.find_spec("transformers") is not None
    except ValueError:  # a stand-in in sys.modules without a spec
        found = False
    if not found:
        raise ValueError("transformers is not installed. Run pip install 'genlip-megatron[hf]'.")
