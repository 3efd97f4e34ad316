"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models, tokenizers and texts beside the repository; they are not part of the project."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("no real models and tokenizers: ../shared is absent beside the repository")
    return path
