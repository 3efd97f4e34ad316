"""Rates come back out of the times that they make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gossamer import _native
from gossamer.planner.calibrate import filled, measure_tables
from gossamer.planner.efficiencies import ROWS, VectorRate
from gossamer.planner.fitting import fit_linear, fit_vector, non_negative
from gossamer.planner.roofline import vector_seconds
from gossamer.planner.small_programs import Sample, SmallProgram, small_graph
from tests.planner.small import efficiencies


def test_least_squares_hold_at_zero() -> None:
    a = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert non_negative(a, a @ [2.0, 3.0]) == pytest.approx([2.0, 3.0])
    assert non_negative(a, a @ [5.0, -1.0])[1] == 0.0
    assert not non_negative(a, a @ [-1.0, -1.0]).any()


def test_an_op_over_rows_is_found_again() -> None:
    rate = VectorRate(overhead_us=0.5, number_ns=0.25)
    found = [(512.0, rows, vector_seconds(0.5, 0.25, 512, rows, 2)) for rows in ROWS]
    again = fit_vector(found, 2)
    assert (again.overhead_us, again.number_ns) == pytest.approx((rate.overhead_us, rate.number_ns))


def test_a_linear_layer_is_found_again() -> None:
    program = SmallProgram(small_graph("int8", 1), "bf16", "scalar", _native.Pool(1))
    peak, read = 100e9, 10e9
    parts = dict(zip(ROWS, (0.25, 0.5, *[0.8] * 7), strict=True))
    samples, far = [], []
    for instruction in program.program._instructions:
        if "linear" not in instruction.op or instruction.op == "linear_top1":
            continue
        weights = [program.graph.weights[name] for name, _ in instruction.weights]
        width = program.graph.values[instruction.node].shape[1]
        assert isinstance(width, int)
        macs = weights[0].shape[1] * sum(w.shape[0] for w in weights)
        for rows in ROWS:
            seconds = macs * rows / (peak * parts[rows]) + 1e-9 * width * rows + 2e-6
            samples.append(Sample(instruction, rows, seconds))
        size = sum(program.program._place_bytes[w] for w in instruction.weights)
        far.append(Sample(instruction, 1, size / (0.5 * read) + 2e-6))
    rate = fit_linear(program, samples, program, far, peak=peak, read=read, threads=1)
    assert rate.compute == pytest.approx(tuple(parts.values()), rel=1e-3)
    assert (rate.output_ns, rate.overhead_us) == pytest.approx((1.0, 2.0), rel=1e-2)
    assert rate.bandwidth == pytest.approx(0.5, rel=0.1)


def test_instructions_are_timed_by_what_they_are() -> None:
    program = SmallProgram(small_graph("f32", 1), "bf16", "scalar", _native.Pool(1))
    samples = program.times([(0, 3)], repeats=1)
    assert {s.rows for s in samples if s.instruction.op == "rms_norm"} == {3, 1}
    assert all(s.seconds > 0 for s in samples)


def test_tables_lend_each_other_what_they_lack() -> None:
    [table] = efficiencies().tables["scalar"]
    crossing = replace(table.linear["f32"], output_ns=1.5, overhead_us=2.0)
    few = replace(table, linear={"f32": crossing}, read_gb_s=5.0)
    first, second = filled([few, table])
    assert first.linear.keys() == second.linear.keys() == table.linear.keys()
    assert (first.read_gb_s, second.read_gb_s) == (5.0, 10.0)
    lent = first.linear["int8"]
    assert (lent.compute, lent.output_ns, lent.overhead_us) == (table.linear["int8"].compute, 1.5, 2.0)
    assert second.linear == table.linear


@pytest.mark.slow
def test_this_machine_can_be_measured() -> None:
    tables = measure_tables(str(_native.best_isa()))
    assert 1 <= len(tables) <= 4
    for table in tables:
        for name, rate in table.linear.items():
            assert all(0.02 < part < 1.3 for part in rate.compute), (name, rate)
