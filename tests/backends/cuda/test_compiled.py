"""What the interpreter runs, the compiler takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = 227 << 10  # bytes that a program may have on an H200


@pytest.mark.slow
def test_kernels_compile_for_an_h200(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.cuda.compiled"],
        cwd=Path(__file__).parents[3],
        env={**env, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    names = {"_gemv_grouped", "_gemv_rows", "_gemm", "_linear_int8", "_merge", "_experts", "_sum_slots"}
    assert names <= {name for name, _ in kernels}
    assert all(int(shared) <= SHARED for _, shared in kernels)
