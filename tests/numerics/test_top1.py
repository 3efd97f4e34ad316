"""The head that chooses tokens tile by tile: what the sampler chooses at temperature 0, to the last tie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.backends.cpu.program import CpuProgram
from tests.numerics.harness import ISAS, OpGraph, make_cpu


def head(hidden: np.ndarray, weight: np.ndarray, format: str, isa: str) -> CpuProgram:
    """A program whose logits are hidden . weight^T."""
    g = OpGraph()
    rows = g.builder.op("take_rows", g.input("x", hidden), "rows")
    y = g.builder.linear(rows, g.weight("w", weight))
    group = 32 if format == "int4" else 0
    graph = g.finish(y, formats={"w": (format, group)}, vocab=len(weight))
    program = make_cpu(graph, g.arrays, len(hidden), isa=isa)
    program.ids[:] = program.rows[:] = np.arange(len(hidden))
    program.sample_rows["temperature"] = 0.0
    program.sample_rows["top_p"] = program.sample_rows["repetition"] = 1.0
    for name in ("logprobs", "mask_row", "target"):
        program.sample_rows[name] = -1
    return program


def chosen(program: CpuProgram, rows: int, top1: bool) -> list[tuple[int, int]]:
    program.token[:], program.bad[:] = 77, 77
    program.run(rows, 1, rows, 0, top1=top1)
    return list(zip(program.token[:rows].tolist(), program.bad[:rows].tolist(), strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("vocab", [1, 15, 33, 1000, 5003])
def test_the_same_token_as_the_sampler(isa: str, format: str, vocab: int) -> None:
    rng = np.random.default_rng([vocab])
    hidden = rng.standard_normal((11, 40)).astype(np.float32)
    weight = rng.standard_normal((vocab, 40)).astype(np.float32)
    program = head(hidden, weight, format, isa)
    for rows in (1, 2, 11):
        assert chosen(program, rows, True) == chosen(program, rows, False)
    ran = {line.kernel: line.calls for line in program.receipt()}
    assert ran[f"linear_top1_{format}"] == 3
    assert ran[f"linear_{format}"] == 3


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")]),
        min_size=1,
        max_size=90,
    )
)
def test_ties_and_values_that_are_no_numbers(values: list[float]) -> None:
    """Weights of one input are the logits themselves."""
    weight = np.asarray(values, np.float32)[:, None]
    program = head(np.ones((1, 1), np.float32), weight, "f32", ISAS[-1])
    assert chosen(program, 1, True) == chosen(program, 1, False)
