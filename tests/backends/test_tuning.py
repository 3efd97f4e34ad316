"""Autotuning: choices are remembered per machine, damage costs nothing, and no choice shows in a bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gossamer.backends.cpu import program as cpu_program
from gossamer.backends.cpu.program import CpuProgram
from gossamer.backends.cpu.tuning import DEFAULT, ROWS, Choice, TuningFile
from tests.numerics.harness import ISAS, OpGraph, make_cpu, run_cpu


def layer(format: str = "int4", group: int = 32) -> tuple[CpuProgram, OpGraph]:
    """One linear layer that sees up to 300 rows."""
    rng = np.random.default_rng(0)
    g = OpGraph()
    x = g.input("x", rng.standard_normal((300, 96)).astype(np.float32))
    y = g.builder.linear(x, g.weight("w", rng.standard_normal((200, 96)).astype(np.float32)))
    return make_cpu(g.finish(y, formats={"w": (format, group)}), g.arrays, 300, isa=ISAS[-1]), g


def output(program: CpuProgram, g: OpGraph, rows: int) -> np.ndarray:
    return run_cpu(program.graph, g.arrays, rows, isa=ISAS[-1], program=program)


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_program, "_TUNED_FROM", 0)


def test_the_first_start_measures_and_the_next_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = layer()
    first.tune(tmp_path)
    (name,) = first.tunings
    assert name == "linear int4-g32 200x96"
    assert tuple(first.tunings[name]) == ROWS
    monkeypatch.setattr("gossamer.backends.cpu.tuning._measure", lambda *a: pytest.fail("measured again"))
    second, _ = layer()
    second.tune(tmp_path)
    assert second.tunings == first.tunings


def test_another_thread_count_is_another_machine(tmp_path: Path) -> None:
    one, two = (TuningFile(tmp_path, "cpu", "avx2", threads) for threads in (1, 2))
    one.add({"layer": {1: Choice(4, 128)}})
    assert one.read() == {"layer": {1: Choice(4, 128)}}
    assert two.read() == {}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"layers": {"a": {"1": [0, 256]}}}', '{"layers": {"a": {"x": [1, 2]}}}', "\0" * 99],
)
def test_a_damaged_file_reads_as_nothing_and_is_mended(tmp_path: Path, text: str) -> None:
    file = TuningFile(tmp_path, "cpu", "avx2", 2)
    file.path.write_text(text)
    assert file.read() == {}
    file.add({"layer": {1: DEFAULT}})
    assert file.read() == {"layer": {1: DEFAULT}}


def test_a_place_that_cannot_be_written_costs_the_memory_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    program, _ = layer()
    program.tune(tmp_path / "file")
    assert program.tunings


@pytest.mark.parametrize(("format", "group"), [("f32", 0), ("bf16", 0), ("int8", 0), ("int4", 32)])
def test_no_choice_changes_a_bit(format: str, group: int) -> None:
    program, g = layer(format, group)
    want = {rows: output(program, g, rows) for rows in (1, 8, 9, 64, 65, 300)}
    index = next(i for i, done in enumerate(program._instructions) if done.op == "linear")
    for tiles, block_rows in ((1, 16), (2, 256), (5, 7), (64, 100), (1000, 1)):
        for at in range(len(ROWS)):
            program.program.set_tuning(index, at, tiles, block_rows)
        for rows, whole in want.items():
            assert np.array_equal(output(program, g, rows), whole), (tiles, block_rows, rows)
