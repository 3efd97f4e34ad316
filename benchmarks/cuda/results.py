"""The results of a machine: a file of JSON that every row is added to, and the table that shows it."""

from __future__ import annotations

import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from gossamer.backends.cuda.device import Device
from gossamer.errors import ConfigError

__all__ = ["Results", "table"]

_TINY = "shapes of a test, in Triton's interpreter: no figure here is a measurement"
_COLUMNS = {"figure": "left", "measured": "right", "of": "left", "is": "right", "bar": "right", "": "left"}


class Results:
    """What is known of a machine in `directory`; it is on disk as soon as it is added.

    content: {"device", "isa", "versions", "rows": {row: {"lines", "seconds", "when"; "error", "log"}}}, and
    "tiny" where nothing was measured. Raises ConfigError where the file cannot be read or made.
    """

    def __init__(self, directory: Path, device: Device, *, tiny: bool = False) -> None:
        name = "tiny" if tiny else re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
        self.path = directory / f"{name}.json"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            known = json.loads(self.path.read_text())["rows"] if self.path.exists() else {}
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"results cannot be kept in {self.path}: {error}; give another --out") from None
        self.content: dict[str, Any] = {"device": device.name, "isa": device.isa, "versions": _versions()}
        if tiny:
            self.content["tiny"] = _TINY
        self.content["rows"] = known

    def add(self, row: str, found: dict[str, Any]) -> None:
        """Puts a row in the place of what was known of it, and writes the file."""
        self.content["rows"][row] = found | {"when": datetime.now(UTC).isoformat(timespec="seconds")}
        other = self.path.with_suffix(".new")
        other.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(other, self.path)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("gossamer", "torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def table(content: dict[str, Any], rows: list[str]) -> Table:
    """The rows asked for, a line for each figure."""
    shown = Table(title=f"{content['device']} ({content['isa']})", caption=content.get("tiny"))
    for name, side in _COLUMNS.items():
        shown.add_column(name, justify=side)  # type: ignore[arg-type]
    for row in rows:
        found = content["rows"].get(row)
        if found is None:
            continue
        for line in found["lines"]:
            shown.add_row(*_cells(line, tiny="tiny" in content))
        if found.get("error"):
            shown.add_row(row, "", "", "", "", f"[red]failed: {found['error'].splitlines()[0][:200]}[/red]")
    return shown


def _cells(line: dict[str, Any], *, tiny: bool) -> tuple[str, ...]:
    limit, share, bar, unit = line["limit"], line["share"], line["bar"], line["unit"]
    against = "" if limit is None else f"{limit:.4g} {unit}, {line['against']}"
    times = bar is not None and bar > 1
    part = "" if share is None else f"{share:.2f}x" if times else f"{share:.1%}"
    sign = ">=" if line["wanted"] == "at least" else "<="
    wanted = "" if bar is None else f"{sign} {bar:.0f}x" if times else f"{sign} {bar:.0%}"
    words = {True: "[green]reached[/green]", False: "[yellow]missed[/yellow]", None: ""}
    verdict = "no measurement" if tiny else words[line["reached"]]
    return line["case"], f"{line['value']:.4g} {unit}", against, part, wanted, verdict
