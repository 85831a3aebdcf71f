"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes import Zygote


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """The parent of the fault tests' runs."""
    zygote = Zygote(tmp_path_factory.mktemp("ranks"))
    yield zygote
    zygote.close()
