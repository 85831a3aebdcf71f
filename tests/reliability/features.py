"""What the code under test has: tests of what it does not have yet are skipped with its name."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable

import pytest


def _module(name: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(f"genlip_megatron.{name}") is not None


def _store_has(word: str) -> Callable[[], bool]:
    def look() -> bool:
        from genlip_megatron.checkpoint import store

        return word in inspect.getsource(store)

    return look


_FEATURES: dict[str, Callable[[], bool]] = {
    "checked files": _store_has("manifest"),
    "failed saves": _store_has("manifest"),
    "asynchronous saves": _store_has("async"),
    "fault injection": _module("faults.inject"),
    "watchdog": _module("faults.watchdog"),
}


def requires(*features: str) -> pytest.MarkDecorator:
    """Skip a test until the code has all of these features."""
    missing = [feature for feature in features if not _FEATURES[feature]()]
    return pytest.mark.skipif(bool(missing), reason=f"there is no {', no '.join(missing)} yet")
