"""What the interpreter runs, the compiler takes for an H200, and the chip holds. Triton decides once whether
it interprets, hence a process for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHARED = 232_448
"""Bytes of shared memory that a program may have on sm_90."""
SLOW = pytest.mark.slow
LINEAR = {
    "_gemv_grouped",
    "_gemv_words",
    "_gemv_rows",
    "_gemm",
    "_linear_int8",
    "_merge",
    "_experts",
    "_sum_slots",
}


@pytest.mark.parametrize(
    ("what", "kernels"),
    [
        (("rows",), {"_scan_kernel", "_draw_kernel", "_quantize_kernel", "_rms_norm_kernel"}),
        pytest.param(("attention", "bf16"), {"_decode", "_prefill", "_copy"}, marks=SLOW),
        pytest.param(("attention", "f32", "f16", "bf16", "int8", "fp8"), {"_decode"}, marks=SLOW),
        pytest.param(("linear",), LINEAR, marks=SLOW),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_kernels_compile_and_fit(tmp_path: Path, what: tuple[str, ...], kernels: set[str]) -> None:
    found = compiled(tmp_path, *what)
    assert kernels <= {kernel for kernel, _ in found}
    assert all(int(shared) <= SHARED for _, shared in found), found


def test_counts_of_a_step_make_no_variants(tmp_path: Path) -> None:
    """Or each first step of its kind would wait for the compiler."""
    names = [name for name, _ in compiled(tmp_path, "counts")]
    assert sorted(names) == ["_decode", "_gemm", "_prefill", "_rms_norm_kernel"]


def compiled(tmp_path: Path, name: str, *options: str) -> list[list[str]]:
    """Name and shared memory of the kernels that a module of tests compiles."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT)))}
    command = [sys.executable, "-m", f"tests.backends.cuda.sm90_{name}", *options]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()]
