"""A fork server of drivers for these tests too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.harness import Drivers


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    server = Drivers(tmp_path_factory.mktemp("drivers"))
    yield server
    server.close()
