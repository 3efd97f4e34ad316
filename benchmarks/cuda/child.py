"""Measures one row in this process: python -m benchmarks.cuda.child ROW --to FILE.

Each thing that is known is a line of JSON in FILE at once, so that nothing is lost with the process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["main", "measure"]

Tell = Callable[[Mapping[str, Any]], None]


def measure(name: str, *, tiny: bool, before: dict[str, Any], tell: Tell) -> bool:
    """Measures a row and tells every line, then {"seconds"}, or {"error"} with the reason; whether all of it
    was measured. before: rows of the same machine, as results have them."""
    from benchmarks.cuda.measure import Bench
    from benchmarks.cuda.rows import ROWS
    from gossamer.backends.cuda.device import open_device

    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as directory:
            bench = Bench(open_device(), Path(directory), tiny, before)
            for line in ROWS[name].lines(bench):
                tell({"line": line.as_json()})
    except Exception as error:  # a row that fails is a result, and its reason is what there is to know
        traceback.print_exc()
        tell({"error": f"{type(error).__name__}: {error}"})
        return False
    tell({"seconds": round(time.perf_counter() - began, 1)})
    return True


def main(arguments: list[str] | None = None) -> int:
    """Measures the row; 1 where it failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    if options.tiny:  # to be known before Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    before = json.loads(options.before.read_text()) if options.before else {}
    with options.to.open("a") as file:

        def tell(what: Mapping[str, Any]) -> None:
            file.write(json.dumps(what) + "\n")
            file.flush()

        return 0 if measure(options.row, tiny=options.tiny, before=before, tell=tell) else 1


if __name__ == "__main__":
    sys.exit(main())
