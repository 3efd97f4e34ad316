"""The benchmark of the cuda backend's attention, where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cuda_attention import main


def test_it_says_that_it_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main([]) == 1
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
