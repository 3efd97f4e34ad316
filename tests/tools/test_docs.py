"""tools/docs: no verb is left out of the page of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from gossamer.cli.main import app

ROOT = Path(__file__).parents[2]


def _verbs(command: Any, name: str = "") -> Iterator[str]:
    inner = getattr(command, "commands", {})
    for part, one in inner.items():
        yield from _verbs(one, f"{name} {part}".strip())
    if not inner:
        yield name


def test_every_verb_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    listed = __import__("docs").VERBS
    assert sorted(_verbs(typer.main.get_command(app))) == sorted(listed)
    page = (ROOT / "docs" / "cli.md").read_text()
    assert [verb for verb in listed if f"\n## gossamer {verb}\n" not in page] == []
