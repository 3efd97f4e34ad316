"""Running the command line in this process, and models for it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gossamer.cli.main import run


@dataclass(frozen=True)
class Ran:
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one object it must be."""
        assert self.code == 0, self.err
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def complaint(self) -> str:
        """The one line that a user's mistake leaves."""
        assert self.code == 2, (self.code, self.err)
        assert not self.out
        lines = self.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("gossamer: "), self.err
        return lines[0]


Cli = Callable[..., Ran]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    """cli("generate", MODEL, ..., stdin="") -> Ran, with no GOSSAMER_ variable from outside."""
    import os

    for name in [n for n in os.environ if n.startswith("GOSSAMER_") and n != "GOSSAMER_CACHE"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("gossamer.planner.hardware.probe_buffer_bytes", lambda: 64 << 20)  # quick, not right
    monkeypatch.setattr("gossamer.planner.hardware._SECONDS", 0.02)

    def call(*arguments: object, stdin: str = "") -> Ran:
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with redirect_stdout(out), redirect_stderr(err):
            code = run([str(a) for a in arguments])
        return Ran(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A 260K-parameter storyteller."""
    return shared / "models" / "stories260K"
