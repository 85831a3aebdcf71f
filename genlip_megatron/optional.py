"""Packages that only some tools need."""

from __future__ import annotations

import importlib.util

_EXTRAS = {"transformers": "hf", "matplotlib": "evaluate", "jinja2": "evaluate"}


def need(package: str) -> None:
    """Check that "transformers", "matplotlib" or "jinja2" is installed, without importing it.

    Raises:
        ValueError: it is not.
    """
    try:
        found = importlib.util.find_spec(package) is not None
    except ValueError:  # a stand-in in sys.modules without a spec
        found = False
    if not found:
        raise ValueError(f"{package} is not installed. Run pip install '.[{_EXTRAS[package]}]' in the checkout.")
