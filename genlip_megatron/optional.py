"""Packages that only some tools need."""

from __future__ import annotations

import importlib
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


def need_open_clip() -> None:
    """Import OpenCLIP with its GenLIP, which open_clip_torch 3.3.0 on PyPI lacks.

    Raises:
        ValueError: it does not import.
    """
    try:
        importlib.import_module("open_clip.naflex_genlip_model")
    except Exception as error:  # also what its own imports raise
        raise ValueError(
            f"OpenCLIP with GenLIP does not import ({error}). Run pip install "
            "git+https://github.com/mlfoundations/open_clip, with the torchvision of this torch."
        ) from None
