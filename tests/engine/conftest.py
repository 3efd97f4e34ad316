"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from tests.engine import serving


@pytest.fixture(params=[False, True], ids=["in turn", "overlapping"])
def overlaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether executors made by `serving.executor` compute a step only when it is collected, so that the
    engine plans the next one meanwhile: both in turn."""
    monkeypatch.setattr(serving, "OVERLAPS", request.param)
    return bool(request.param)
