"""The instructions that the time model counts are those that a program runs."""

from __future__ import annotations

from collections import Counter

import pytest

from gossamer.backends.cpu.program import CpuProgram, StepShape
from gossamer.checkpoint.weights import DummySource
from gossamer.config import EngineConfig, MixedPrecision, Quantization
from gossamer.planner.costs import step_costs
from gossamer.planner.work import AttentionWork, LinearWork, VectorWork, step_work
from tests.planner.small import config, graph

CONFIGS = {
    "f32": config(),
    "bf16": config(mixed_precision=MixedPrecision(dtype="bf16")),
    "int8": config(quantization=Quantization(format="int8")),
    "int4": config(quantization=Quantization(format="int4", group=64)),
    "unfused": config(operator_fusion=None, layer_fusion=None),
    "int8 unfused": config(quantization=Quantization(format="int8"), operator_fusion=None),
}


@pytest.mark.parametrize("given", CONFIGS.values(), ids=CONFIGS)
def test_every_instruction_of_the_program_is_counted(given: EngineConfig) -> None:
    made = graph(given)
    shape = StepShape(tokens=8, rows=2, spans=2, page_size=16, pages=4, table=2, kv_dtype="bf16")
    program = CpuProgram(made, DummySource(made), shape, isa="scalar", threads=1)
    emitted = Counter(_kind(i.op) for i in program._instructions if i.op != "linear_top1")
    counted: Counter[str] = Counter()
    for work, count in step_work(made, "bf16").works:
        kinds = {LinearWork: "linear", AttentionWork: "attention"}
        counted[work.name.partition(" ")[0] if isinstance(work, VectorWork) else kinds[type(work)]] += count
    assert counted == emitted


def _kind(op: str) -> str:
    return "linear" if "linear" in op else op


def test_bytes_are_those_of_the_costs() -> None:
    made = graph(CONFIGS["int4"])
    work, costs = step_work(made, "int8"), step_costs(made, "int8")
    assert work.matrix_bytes == costs.matrix_bytes
    assert work.token_bytes == sum(size for size, _ in costs.kv)
    assert work.stored == "int4-g64"


def test_the_head_alone_is_a_head() -> None:
    heads = [w for w, _ in step_work(graph(), "bf16").works if isinstance(w, LinearWork) and w.head]
    assert [(w.multiplied, w.inputs, w.sampled, w.unit) for w in heads] == [(320, 128, True, False)]
