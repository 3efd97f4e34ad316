"""The server that most tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.serving import Live, serving, text_engine, wait_for


@pytest.fixture(scope="session")
def model(shared: Path) -> Path:
    path = shared / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip("no model: ../shared/models/stories260K is absent beside the repository")
    return path


@pytest.fixture(scope="session")
def _server(model: Path) -> Iterator[Live]:
    with serving(text_engine(model)) as live:
        yield live


@pytest.fixture
def live(_server: Live) -> Iterator[Live]:
    """After each test nothing may run and every page must be free."""
    yield _server
    wait_for(_server.idle)
    _server.engine.engine.check()
