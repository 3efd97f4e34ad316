"""Kernels run in Triton's interpreter where there is no GPU: to be known before Triton is imported, whose own
functions are made for one or the other then."""

from __future__ import annotations

import os

import pytest
from _pytest.terminal import TerminalReporter

torch = pytest.importorskip("torch", reason="the cuda backend needs torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="the cuda backend needs Triton (pip install 'gossamer[cuda]')")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors of these tests lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Says on what the kernels ran."""
    where = "Triton's interpreter"
    if os.environ.get("TRITON_INTERPRET") != "1":
        chip = torch.cuda.get_device_properties(0)
        where = f"{chip.name} (sm_{chip.major}{chip.minor}, {chip.total_memory / 2**30:.0f} GiB)"
    terminalreporter.write_line(f"on {where}, torch {torch.__version__}, triton {triton.__version__}")
