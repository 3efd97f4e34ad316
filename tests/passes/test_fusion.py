"""Operator and layer fusion: each rule and each tiling gives the bits of the plain graph, on the CPU backend,
and the numbers of the plain graph in torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer import _native
from gossamer.backends.cpu.program import CpuProgram, StepShape
from gossamer.backends.reference.module import ReferenceModel
from gossamer.checkpoint.weights import DummySource
from gossamer.config import EngineConfig, LayerFusion, MixedPrecision, OperatorFusion, Quantization
from gossamer.config.operator_fusion import RULES
from gossamer.errors import ConfigError, GraphError
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph, Unit
from gossamer.graph.text import graph_text
from gossamer.graph.verify import verify
from gossamer.passes.memory_reuse import intervals, plan_arena
from gossamer.passes.operator_fusion import RULES as TABLE
from gossamer.passes.pipeline import run_passes
from tests.families.configs import CASES
from tests.numerics.harness import ISAS

# Which model shows which rule.
SHOWN = {
    "qkv_merge": ("llama", "qwen3", "gpt2", "phi3"),
    "gate_up_merge": ("llama", "qwen3", "phi3"),
    "activation_epilogue": ("gpt2",),
    "residual_epilogue": ("llama", "gpt2", "mixtral"),
    "norm_residual": ("gemma2", "gemma3"),
    "norm_quantize": ("llama", "gpt2", "qwen2"),
}
FORMATS = ("f32", "f16", "bf16", "int8", "int8-g16", "int4-g32", "uint4-g32", "nf4-g32")


@dataclass(frozen=True)
class Model:
    """A graph after some passes, and where its weights come from."""

    graph: Graph
    source: DummySource


@cache
def plain(family: str) -> Model:
    """A family's graph as its builder makes it."""
    case = CASES[family]
    config = case.config()
    name = type(config).__name__.removesuffix("Config").removesuffix("Text")
    architecture = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    graph = build_graph({**config.to_dict(), "architectures": [architecture]}, context=case.context)
    return Model(graph, DummySource(graph))


def passed(family: str, format: str, **options: Any) -> Model:
    if format in ("f16", "bf16"):
        options["mixed_precision"] = MixedPrecision(dtype=format)  # type: ignore[arg-type]
    elif format != "f32":
        options["quantization"] = Quantization.parse(format)
    model = plain(family)
    return replace(model, graph=run_passes(model.graph, EngineConfig(model="m", **options))[0])


def unfused(family: str, format: str) -> Model:
    return passed(family, format, operator_fusion=None, layer_fusion=None)


def logits(
    model: Model, lengths: tuple[int, ...], *, unit_rows: int = 16, isa: str = "", chunks: int = 1
) -> np.ndarray:
    """Logits of every token of some sequences that prefill side by side, in `chunks` steps."""
    graph, total = model.graph, sum(lengths)
    tables = [-(-n // 16) for n in lengths]
    pages = sum(tables)
    shape = StepShape(
        tokens=total, rows=total, spans=len(lengths), page_size=16, pages=pages, table=pages, kv_dtype="f32"
    )
    isa = isa or str(_native.best_isa())
    program = CpuProgram(graph, model.source, shape, isa=isa, threads=2, unit_rows=unit_rows)
    ids = np.random.default_rng(1).integers(0, graph.vocab, total)
    starts = np.cumsum([0, *lengths])
    stride = len(lengths) * pages
    for s, first in enumerate(np.cumsum([0, *tables[:-1]])):
        for g in range(len(graph.kv_groups)):
            at = g * stride + s * pages
            program.tables[at : at + tables[s]] = range(first, first + tables[s])
    out = np.zeros((total, graph.vocab), np.float32)
    for chunk in range(chunks):
        row, where = 0, []
        for s, n in enumerate(lengths):
            a, b = n * chunk // chunks, n * (chunk + 1) // chunks
            program.spans[s] = (row, b - a, a, s * pages, -1)
            program.ids[row : row + b - a] = ids[starts[s] + a : starts[s] + b]
            program.positions[row : row + b - a] = np.arange(a, b)
            where += range(starts[s] + a, starts[s] + b)
            row += b - a
        program.rows[:row] = np.arange(row)
        program.run(row, len(lengths), row, stride, sample=False)
        out[where] = program.value("logits", row)
    return out


def test_the_config_names_the_rules_of_the_table() -> None:
    assert tuple(dict.fromkeys(rule.name for rule in TABLE)) == RULES
    assert set(SHOWN) == set(RULES)


@pytest.mark.parametrize(("rule", "family"), [(r, f) for r, families in SHOWN.items() for f in families])
@pytest.mark.parametrize("format", FORMATS)
def test_a_rule_changes_the_graph_and_no_bit(rule: str, family: str, format: str) -> None:
    if rule == "norm_quantize" and format in ("f32", "f16"):
        pytest.skip("activations of these formats are float32 as they are")
    before = unfused(family, format)
    alone = OperatorFusion(without=tuple(r for r in RULES if r != rule))
    fused = passed(family, format, operator_fusion=alone, layer_fusion=None)
    assert {n.op for n in fused.graph.nodes} != {n.op for n in before.graph.nodes}
    assert np.array_equal(logits(fused, (37, 1)), logits(before, (37, 1)))


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("format", FORMATS)
def test_all_fusions_keep_every_bit_of_every_family(family: str, format: str) -> None:
    fused = passed(family, format)
    assert fused.graph.units
    want = logits(unfused(family, format), (40, 3, 20))
    assert np.array_equal(logits(fused, (40, 3, 20)), want)
    assert np.array_equal(logits(fused, (40, 3, 20), chunks=3), want)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_runs_the_fused_graph(isa: str) -> None:
    want = logits(unfused("qwen3", "int8"), (40,), isa=isa)
    assert np.array_equal(logits(passed("qwen3", "int8"), (40,), isa=isa), want)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5).map(tuple),
    rows=st.sampled_from([16, 32, 48, 512]),
    format=st.sampled_from(FORMATS),
    chunks=st.integers(1, 3),
)
def test_tiles_of_a_unit_do_not_show(lengths: tuple[int, ...], rows: int, format: str, chunks: int) -> None:
    chunks = min(chunks, *lengths)
    got = logits(passed("llama", format), lengths, unit_rows=rows, chunks=chunks)
    assert np.array_equal(got, logits(passed("llama", format, layer_fusion=None), lengths))


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("format", ["f32", "int8"])
def test_the_reference_runs_the_fused_graph(family: str, format: str) -> None:
    both = unfused(family, format), passed(family, format)
    ids = torch.randint(0, both[0].graph.vocab, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want, got = (ReferenceModel.load(m.graph, m.source).logits(ids) for m in both)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_units_hold_what_only_they_need_for_a_tile_of_rows() -> None:
    graph = passed("llama", "int8").graph
    counts = {"T": 512, "R": 4, "S": 4}
    whole, tiled = plan_arena(graph, counts), plan_arena(graph, counts, unit_rows=64)
    assert tiled.bytes < whole.bytes / 2
    assert graph.tiled() == frozenset().union(*map(graph.inner, graph.units)) != frozenset()
    for unit in graph.units:
        for life in intervals(graph, counts, unit_rows=64):
            if life.value in graph.inner(unit):
                assert life.bytes <= 64 * 4 * 4 * graph.hidden * 2
    lives = intervals(graph, counts, unit_rows=64)
    for i, a in enumerate(lives):
        for b in lives[i + 1 :]:
            if a.first <= b.last and b.first <= a.last:
                x, y = tiled.offsets[a.value], tiled.offsets[b.value]
                assert x + a.bytes <= y or y + b.bytes <= x, (a, b)


def test_the_printed_graph_shows_units() -> None:
    text = graph_text(passed("llama", "int8").graph, scope="layers.0")
    assert "[layers.0.mlp]  one unit: norm, gated exist for a tile of rows; residual for every token" in text


def test_a_unit_over_sampled_rows_is_refused() -> None:
    graph = passed("llama", "f32").graph
    with pytest.raises(GraphError, match="follow the step's tokens"):
        verify(replace(graph, units=(Unit("head", len(graph.nodes) - 2, len(graph.nodes)),)))


def test_unknown_rules_and_odd_tiles_are_refused() -> None:
    with pytest.raises(ConfigError, match="gate_up_merge"):
        OperatorFusion(without=("gate_up",))
    for rows in (0, 8, 250):
        with pytest.raises(ConfigError, match="multiple of 16"):
            LayerFusion(rows=rows)
