"""The kernel benchmark's cases, figures and command line."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from benchmarks.kernel_cases import Case, Work, benches, limit_of, sparse_stores, stores
from benchmarks.kernels import Line, _print, main, measure, report
from gossamer import _native
from gossamer.backends.cpu.formats import FORMATS
from gossamer.config.engine import KVType
from gossamer.config.quantization import GROUPS, WeightFormat
from gossamer.planner.hardware import Rates

RATES = Rates(read_gb_s=10.0, int8_gmacs=100.0, bf16_gmacs=50.0, fp32_gmacs=25.0, threads=2, isa="scalar")


def test_every_format_of_the_product_is_a_store_once() -> None:
    found = stores()
    names = [store.name for store in found]
    assert names[0] == "f32" and len(set(names)) == len(names)
    assert {name.partition("-")[0] for name in names} == set(FORMATS)
    assert {f"{f}-g{g}" for f, groups in GROUPS.items() for g in groups} < set(names)
    assert set(get_args(WeightFormat)) - {name.partition("-")[0] for name in names} == {"fp8"}


def test_every_kv_type_has_attention_cases() -> None:
    names = [
        case.name for bench in benches(lambda name: name.startswith("attention/"), 1) for case in bench.cases
    ]
    assert {name.split("/")[1] for name in names} == set(get_args(KVType)) - {"fp8"}
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize(
    "name",
    [
        "rms_norm/m2",
        "rope/m1",
        "act_mul/m4",
        "add/m1",
        "linear/int8/kv-512x2048/m2",
        "linear/int8-sparse-0.5/kv-512x2048/m2",
        "linear/bf16-sparse-2:4/kv-512x2048/m2",
        "prepare/int8/q-2048x2048/m2",
    ],
)  # fmt: skip
def test_a_case_runs_and_the_receipt_names_its_kernel(isa: str, name: str) -> None:
    (bench,) = benches(lambda other: other == name, 1)
    (line,) = measure(bench, isa=isa, threads=1, seconds=0.0)
    assert line.seconds > 0 and line.repeats >= 5 and line.copies == 1
    assert line.kernel.startswith(f"{isa}.{name.partition('/')[0]}")
    assert line.kernel.endswith("_sparse") == ("sparse" in name)


def test_attention_reads_its_kv_and_repeats_until_it_is_cold() -> None:
    name = "attention/bf16/decode/c1024/s1"
    (bench,) = benches(lambda other: other == name, 5 << 20)
    (case,) = bench.cases
    one = 2 * 2 * 8 * 64 * 1024  # bytes of keys and values of a layer
    assert len(bench.graph.kv_groups[0].layers) == 3 and case.work.read == 3 * one
    (line,) = measure(bench, isa=_native.best_isa(), threads=1, seconds=0.0)
    assert line.copies == 3


def test_a_layer_is_what_the_passes_make_of_it() -> None:
    (bench,) = benches(lambda other: other in ("layer/int8/m1", "layer/int8/m64"), 100 << 20)
    assert bench.graph.layers == 2 and len(bench.graph.weights) > 2 * 9
    one, many = measure(bench, isa=_native.best_isa(), threads=1, seconds=0.0)
    assert "linear" in one.kernel and "attention" in one.kernel and one.copies == 2
    layer = 2048 * (2048 * 2 + 512 * 2 + 8192 * 3)
    assert one.case.work.macs == 2 * layer + 512 * 2048 and many.case.work.macs == 64 * one.case.work.macs
    assert one.case.work.read > 2 * layer


def test_linear_work_is_its_weights_and_multiplications() -> None:
    (bench,) = benches(lambda other: other == "linear/bf16/kv-512x2048/m4", 1)
    work = bench.cases[0].work
    assert work.read == 2 * 512 * 2048 and work.macs == 4 * 512 * 2048
    assert work.moved == work.read + 4 * 4 * (512 + 2048)


def test_work_without_zeros_is_what_is_stored() -> None:
    name = "linear/int8-sparse-2:4/kv-512x2048/m1"
    (bench,) = benches(lambda other: other == name, 1)
    work, numbers = bench.cases[0].work, 512 * 2048
    assert work.read == numbers / 2 + numbers / 8 + 4 * 512 and work.macs == numbers
    assert {store.name for store in sparse_stores()} == {
        f"{format}-sparse-{sparsity}" for format in ("int8", "bf16") for sparsity in ("0.5", "2:4")
    }


def test_figures_are_held_against_the_nearer_limit() -> None:
    def line(work: Work) -> Line:
        return Line(Case("x/m1", "x", ((1, 0),), work), "int8", "avx2.x_int8", 0.001, 2, 5)

    streaming = report(line(Work(8e6, 9e6, 1e6)), RATES)
    assert (streaming["of_limit"], streaming["limit"]) == (0.8, "read_gb_s")
    assert (streaming["us"], streaming["gb_s"], streaming["gmac_s"]) == (500.0, 9.0, 1.0)
    busy = report(line(Work(1e6, 1e6, 5e7)), RATES)
    assert (busy["of_limit"], busy["limit"]) == (0.5, "int8_gmacs")
    cached = report(line(Work(0.0, 1e6, 0.0)), RATES)
    assert cached["of_limit"] is None and cached["limit"] is None and cached["gmac_s"] is None


def test_limits_by_format() -> None:
    assert [limit_of(f) for f in ("f32", "f16", "bf16", "int8", "int4")] == [
        "fp32_gmacs", "fp32_gmacs", "bf16_gmacs", "int8_gmacs", "int8_gmacs",
    ]  # fmt: skip


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "add/m1", "--seconds", "0", "--json", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [k["name"] for k in found["kernels"]] == ["add/m1", "add/m16", "add/m128"]
    assert found["probe"]["read_gb_s"] > 0
    _print(RATES, found["kernels"])
    table = capsys.readouterr().out
    assert "of limit" in table and "add/m128" in table


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "nonsense"], "no case matches 'nonsense'; --list prints their names"),
        (["--isa", "neon"], "this machine cannot run neon kernels"),
        (["--threads", "0"], "threads 0 must be at least 1"),
    ],
)
def test_mistakes(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert message in capsys.readouterr().err
