"""A row in a process of its own, which is given up when its time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "run_row"]

ROOT = Path(__file__).parents[2]
_LOOK = 0.2  # seconds between looks at what the process has told
_LOG = 3000  # characters of a failed row's output that are kept


def run_row(name: str, *, tiny: bool, before: dict[str, Any], limit: float) -> Iterator[dict[str, Any]]:
    """{"lines", "seconds"} and, where it failed, "error" and "log": whenever there is a line more, with the
    error that it is not done, and at the end. limit: seconds. before: rows that are known, for the row to be
    held against."""
    began, seen = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as temporary:
        to, known, log = (Path(temporary) / each for each in ("lines", "before", "log"))
        known.write_text(json.dumps(before))
        to.touch()
        command = [sys.executable, "-m", "benchmarks.cuda.child", name, "--to", str(to)]
        command += ["--before", str(known), *(["--tiny"] if tiny else [])]
        with log.open("w") as output:
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )
        error = None
        try:
            while not _ended(child):
                if time.perf_counter() - began > limit:
                    error = f"given up after {limit:g} s"
                    break
                found = _found(to, began)
                if len(found["lines"]) > seen:
                    seen = len(found["lines"])
                    yield found | {"error": "not done", "log": ""}
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if error is None and child.returncode != 0:
            error = f"its process ended with {child.returncode}"
        found = _found(to, began)
        if error is not None:
            found = {"error": error, "log": log.read_text(errors="replace")[-_LOG:]} | found
        yield found


def _ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether it has, a moment later."""
    try:
        child.wait(_LOOK)
    except subprocess.TimeoutExpired:
        return False
    return True


def _found(to: Path, began: float) -> dict[str, Any]:
    """What the process has told so far, its own error too."""
    told = [json.loads(line) for line in to.read_text().splitlines(keepends=True) if line.endswith("\n")]
    found: dict[str, Any] = {
        "lines": [each["line"] for each in told if "line" in each],
        "seconds": round(time.perf_counter() - began, 1),
    }
    for each in told:
        if "error" in each:
            found["error"] = each["error"]
    return found
