"""Draft heads made of a target's graph: every family has one, computed on the CPU as by the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gossamer.backends.cpu.program import CpuProgram, StepShape
from gossamer.checkpoint.weights import DummySource
from gossamer.config import EngineConfig, Quantization
from gossamer.errors import GraphError, UnsupportedModelError
from gossamer.graph.families import build_graph
from gossamer.graph.families.eagle import FEATURES, HIDDEN, build_eagle, own_weights, with_features
from gossamer.graph.ir import Graph
from gossamer.graph.weights import leaves
from gossamer.passes.memory_reuse import intervals
from gossamer.passes.pipeline import run_passes
from tests.graph.small import llama, llama_config

CONFIG = EngineConfig(model="small")
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "head_dim": 8, "query_pre_attn_scalar": 7},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
    "phi": {"architectures": ["Phi3ForCausalLM"], "pad_token_id": 0},
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "vocab_size": 101,
    "n_positions": 64,
}
TOKENS, ROWS = 20, 5


def graph_of(name: str) -> Graph:
    return build_graph(GPT2 if name == "gpt2" else llama_config(**SHAPES[name]), name=name)


def program_of(graph: Graph, config: EngineConfig, source: Any) -> CpuProgram:
    shape = StepShape(tokens=TOKENS, rows=ROWS, spans=2, page_size=16, pages=4, table=2, kv_dtype="f32")
    unit_rows = None if config.layer_fusion is None else 8
    return CpuProgram(
        run_passes(graph, config)[0], source, shape, isa="scalar", threads=1, unit_rows=unit_rows
    )


def run(program: CpuProgram, *, sample: bool = False, top1: bool = False) -> None:
    """One sequence of TOKENS tokens, logits of its last ROWS."""
    program.ids[:TOKENS] = np.arange(TOKENS) * 5
    program.positions[:TOKENS] = np.arange(TOKENS)
    program.rows[:ROWS] = np.arange(TOKENS - ROWS, TOKENS)
    program.spans[0] = (0, TOKENS, 0, 0, -1)
    groups = len(program.graph.kv_groups)
    program.tables[: 2 * groups] = [0, 1] * groups
    program.sample_rows["repetition"] = program.sample_rows["top_p"] = 1.0
    program.sample_rows["logprobs"] = program.sample_rows["mask_row"] = -1
    program.run(TOKENS, 1, ROWS, 2, sample=sample, top1=top1)


def features() -> np.ndarray:
    made = np.random.default_rng(3).normal(size=(TOKENS, 48)).astype(np.float32)
    made[0] = 0  # of a sequence's first token
    return made


@pytest.mark.parametrize("name", [*SHAPES, "gpt2"])
def test_every_family_has_a_head_that_the_cpu_runs_as_the_reference_does(name: str) -> None:
    torch = pytest.importorskip("torch", reason="compares with the torch reference")
    from gossamer.backends.reference import ReferenceModel
    from gossamer.graph.ops.attention import KVState, SpanRows

    head = build_eagle(graph_of(name))
    source = DummySource(head)
    given = features()
    program = program_of(head, CONFIG, source)
    program.input(FEATURES, TOKENS)[...] = given
    run(program)
    out = ReferenceModel.load(head, source)(
        torch.arange(TOKENS) * 5,
        torch.arange(TOKENS),
        torch.arange(TOKENS - ROWS, TOKENS),
        KVState((SpanRows(0, 0, TOKENS, 0),)),
        ("logits", HIDDEN),
        {FEATURES: torch.from_numpy(given)},
    )
    for output, rows in (("logits", ROWS), (HIDDEN, TOKENS)):
        expected = out[output].detach().numpy()
        np.testing.assert_allclose(program.value(output, rows), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", [*SHAPES, "gpt2"])
def test_a_head_shares_all_but_its_layer_and_projections(name: str) -> None:
    target = graph_of(name)
    head = build_eagle(target)
    own = own_weights(head)
    last = {w for node in target.nodes for w in node.weights if node.scope.startswith("layers.2")}
    last = {w for w in last if any(leaves(target.weights[w].expr))}
    renamed = {w.replace("layers.2", "layers.0", 1) for w in last}
    assert set(own) == renamed | {"token_proj", "feature_proj", "feature_bias"}
    for name, weight in head.weights.items():
        assert name in own or target.weights[name] == weight
    assert [group.layers for group in head.kv_groups] == [(0,)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("format", ["none", "int4"])
def test_tapping_features_changes_no_bit_and_gives_what_the_last_layer_gave(format: str, fused: bool) -> None:
    config = replace(CONFIG, quantization=Quantization.parse(format) if format != "none" else None)
    if not fused:
        config = replace(config, operator_fusion=None, layer_fusion=None)
    graph = llama(hidden_size=64, intermediate_size=128, head_dim=8)
    source = DummySource(graph)
    plain = program_of(graph, config, source)
    tapped = program_of(with_features(graph), config, source)
    untiled = program_of(with_features(graph), replace(config, layer_fusion=None, memory_reuse=None), source)
    for program in (plain, tapped, untiled):
        run(program)
    np.testing.assert_array_equal(tapped.value("logits", ROWS), plain.value("logits", ROWS))
    np.testing.assert_array_equal(tapped.value(HIDDEN, TOKENS), untiled.value(HIDDEN, TOKENS))
    assert np.ptp(tapped.value(HIDDEN, TOKENS)) > 0.1


def test_the_greedy_head_works_beside_a_tap() -> None:
    source = DummySource(llama())
    tokens = []
    for graph in (llama(), with_features(llama())):
        program = program_of(graph, CONFIG, source)
        run(program, sample=True, top1=True)
        ran = {line.kernel.rsplit("_", 1)[0]: line.calls for line in program.receipt()}
        assert ran["linear_top1"] == 1
        tokens.append(program.token[:ROWS].tolist())
    assert tokens[0] == tokens[1]


def test_features_keep_their_place_until_they_are_read() -> None:
    head = run_passes(build_eagle(llama()), CONFIG)[0]
    life = next(i for i in intervals(head, {"T": 9, "R": 2, "S": 1}) if i.value == FEATURES)
    reader = next(i for i, node in enumerate(head.nodes) if FEATURES in node.inputs)
    assert (life.first, life.last) == (0, reader) and life.bytes >= 9 * 48 * 4


def test_a_reference_without_its_features_says_so() -> None:
    torch = pytest.importorskip("torch", reason="the reference backend needs torch")
    from gossamer.backends.reference import ReferenceModel
    from gossamer.graph.ops.attention import KVState, SpanRows

    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(GraphError, match="inputs features"):
        ReferenceModel(build_eagle(llama()))(one, one, one, KVState((SpanRows(0, 0, 1, 0),)))


def test_a_graph_without_layer_blocks_is_refused_by_name() -> None:
    graph = llama()
    bare = graph.with_nodes(tuple(replace(node, scope="") for node in graph.nodes))
    with pytest.raises(UnsupportedModelError, match="layer 2 is not one block"):
        build_eagle(bare)
