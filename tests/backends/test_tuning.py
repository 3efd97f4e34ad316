"""Autotuning: choices are remembered per machine, damage costs nothing, and no choice shows in a bit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gossamer.backends.cpu import program as cpu_program
from gossamer.backends.cpu.program import CpuProgram, StepShape
from gossamer.backends.cpu.tuning import DEFAULT, ROWS, Choice, TuningFile
from gossamer.checkpoint.weights import DummySource
from gossamer.config import EngineConfig
from gossamer.graph.families import build_graph
from gossamer.passes.pipeline import run_passes
from tests.numerics.harness import ISAS, OpGraph, make_cpu, run_cpu
from tests.passes.test_weight_formats import DENSE


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
    [
        "",
        "{",
        "[]",
        "\0" * 99,
        "[" * 99999,
        *(
            f'{{"layers": {{"a": {choices}}}}}'
            for choices in (
                '{"1": [0, 256]}',
                '{"x": [1, 2]}',
                '{"1": [6]}',
                '{"1": [2147483648, 256]}',
                '{"1": [6, 1099511627776]}',
                '{"1": [1e999, 256]}',
            )
        ),
    ],
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


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_what_is_no_file_reads_as_nothing_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    file = TuningFile(tmp_path, "cpu", "avx2", 2)
    file.path.mkdir() if kind == "directory" else os.mkfifo(file.path)
    assert file.read() == {}
    file.add({"layer": {1: DEFAULT}})
    assert os.listdir(tmp_path) == [file.path.name]


def test_no_layer_is_measured_over_more_rows_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: set[tuple[str, int]] = set()

    def measure(native: object, indices: list[int], rows: int) -> Choice:
        measured.update((program._instructions[index].node, rows) for index in indices)
        return DEFAULT

    monkeypatch.setattr("gossamer.backends.cpu.tuning._measure", measure)
    # The head has the shape of a layer within a block, and fewer rows than that one.
    graph = build_graph(DENSE | {"vocab_size": DENSE["hidden_size"], "tie_word_embeddings": False})
    graph, _ = run_passes(graph, EngineConfig(model="m", operator_fusion=None))
    shape = StepShape(tokens=300, rows=4, spans=4, page_size=16, pages=4, table=4, kv_dtype="bf16")
    program = CpuProgram(graph, DummySource(graph), shape, isa=ISAS[-1], threads=1, unit_rows=32)
    program.tune(None)
    head = graph.outputs["logits"]
    assert {rows for node, rows in measured if node == head} == {1}
    assert {rows for node, rows in measured if node != head} == {1, 16}


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
