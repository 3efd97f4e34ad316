"""Kernels run in Triton's interpreter where there is no GPU: to be known before they are imported."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("torch", reason="the cuda backend needs torch")
pytest.importorskip("triton", reason="the cuda backend needs Triton (pip install 'gossamer[cuda]')")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors of these tests lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
