"""Kernels run in Triton's interpreter where there is no GPU: to be known before Triton is imported, whose own
functions are made for one or the other then."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch", reason="the cuda backend needs torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the cuda backend needs Triton (pip install 'gossamer[cuda]')")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors of these tests lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
