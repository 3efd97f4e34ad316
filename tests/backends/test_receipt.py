"""What has no kernel is refused with the nearest that has one; what ran is on the receipt."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from gossamer.backends.base import ReceiptLine
from gossamer.backends.cpu.formats import FORMATS, KV_FORMATS, require_kernels
from gossamer.cli.receipt import receipt_table
from gossamer.config import EngineConfig, Quantization
from gossamer.errors import ConfigError
from tests.numerics.harness import ISAS, OpGraph, make_cpu, run_cpu


@pytest.mark.parametrize(
    ("formats", "kv_dtype", "said"),
    [
        ({"f32", "int3"}, "f32", "weights in int3; the nearest that it has is"),
        ({"fp6"}, "f32", "weights in fp6; the nearest that it has is"),
        ({"f64"}, "f32", "weights in f64; the nearest that it has is f32"),
        ({"bf16"}, "f64", "keys and values in f64; the nearest that it has is f32"),
    ],
)
def test_a_format_without_kernels_names_the_nearest(formats: set[str], kv_dtype: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        require_kernels(formats, kv_dtype)


def test_every_format_that_may_be_asked_for_has_kernels() -> None:
    require_kernels(FORMATS, "bf16")
    for kv_dtype in KV_FORMATS:
        require_kernels((), kv_dtype)


def test_unknown_formats_never_reach_the_kernels() -> None:
    with pytest.raises(ConfigError, match="int3"):
        Quantization.parse("int3")
    with pytest.raises(ConfigError, match="KV dtype 'f64' is unknown; choose"):
        EngineConfig(model="m", kv_dtype="f64")  # type: ignore[arg-type]


@pytest.mark.parametrize("isa", ISAS)
def test_a_program_counts_what_ran(isa: str) -> None:
    g = OpGraph()
    x = g.input("x", np.ones((4, 32), np.float32))
    y = g.builder.linear(x, g.weight("w", np.ones((16, 32), np.float32)))
    graph = g.finish(y, formats={"w": ("int8", 0)})
    program = make_cpu(graph, g.arrays, 4, isa=isa)
    assert [line.calls for line in program.receipt()] == [0, 0, 0]
    run_cpu(graph, g.arrays, 4, isa=isa, program=program)
    run_cpu(graph, g.arrays, 3, isa=isa, program=program)
    lines = program.receipt()
    assert [line.kernel for line in lines] == ["embed_f32", "prepare", "linear_int8"]
    assert {line.isa for line in lines} == {isa}
    assert [(line.calls, line.rows) for line in lines] == [(2, 7)] * 3
    assert [line.gb_s is not None for line in lines] == [False, False, True]
    assert sum(line.share for line in lines) == pytest.approx(1)
    titles = [column.header for column in receipt_table(lines).columns]
    assert titles == ["node", "kernel", "calls", "rows", "weights", "GB/s", "ms", "%"]


def test_a_receipt_keeps_its_figures_on_80_columns() -> None:
    line = ReceiptLine(
        node="layers.0.attention.residual", kernel="merged_linear_int4", isa="avx512", calls=12345,
        rows=123456, weight_bytes=999 << 20, seconds=1.25, share=0.084, gb_s=46.0,
    )  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    with console.capture() as printed:
        console.print(receipt_table([line]))
    _, header, _, row = printed.get().splitlines()
    assert header.split() == ["node", "kernel", "calls", "rows", "weights", "GB/s", "ms", "%"]
    assert row.startswith("*.attent")
    shown = ["merged_linear_int4", "12345", "123456", "999", "MiB", "46", "1250.00", "8.4"]
    assert row.split()[1:] == shown
