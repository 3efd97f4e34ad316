"""The reference backend as a torch module: names, taps, training, half types."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the reference backend needs torch (pip install gossamer[torch])")

from gossamer.backends.reference import ReferenceModel, export_tensors  # noqa: E402
from gossamer.checkpoint.weights import DummySource  # noqa: E402
from gossamer.errors import GraphError  # noqa: E402
from gossamer.graph.families import build_graph  # noqa: E402
from gossamer.graph.ir import Graph  # noqa: E402
from gossamer.graph.ops.attention import KVState, SpanRows  # noqa: E402
from gossamer.graph.ops.formats import round_activations, round_weight  # noqa: E402


def graph_of(architecture: str = "LlamaForCausalLM", **fields: Any) -> Graph:
    return build_graph(
        {
            "architectures": [architecture],
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": 101,
            **fields,
        }
    )


def model_of(graph: Graph, **options: Any) -> ReferenceModel:
    return ReferenceModel.load(graph, DummySource(graph), **options)


IDS = torch.arange(20).reshape(2, 10) * 5
SPANS = KVState((SpanRows(0, 0, 10, 0), SpanRows(1, 10, 10, 0)))


def run(model: ReferenceModel, kv: KVState = SPANS, **options: Any) -> dict[str, Any]:
    rows = options.pop("rows", torch.arange(20))
    return model(IDS.flatten(), torch.arange(20) % 10, rows, kv, **options)


def test_parameters_are_the_graph_s_weights_under_their_names() -> None:
    graph = graph_of(tie_word_embeddings=True)
    model = model_of(graph)
    constants = {name for name in graph.weights if name.startswith("rotary.")}
    assert set(model.state_dict()) == set(graph.weights) - constants
    assert {name for name, _ in model.named_buffers()} == constants
    assert model.weight("layers.2.mlp.down_proj") is model.get_parameter("layers.2.mlp.down_proj")
    other = ReferenceModel(graph)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.logits(IDS), model.logits(IDS))


def test_rows_pick_the_tokens_that_get_logits() -> None:
    model = model_of(graph_of())
    every = run(model)["logits"]
    assert torch.equal(every.view(2, 10, -1), model.logits(IDS))
    torch.testing.assert_close(run(model, rows=torch.tensor([9, 19]))["logits"], every[[9, 19]])


def test_any_value_can_be_tapped() -> None:
    model = model_of(graph_of())
    out = run(model, outputs=("layers.1.mlp.residual", "logits", "layers.0.attention.q"))
    assert out["layers.1.mlp.residual"].shape == (20, 48)
    assert out["layers.0.attention.q"].shape == (20, 48)
    assert torch.equal(out["logits"], run(model)["logits"])


def test_without_a_cache_only_what_is_asked_for_is_computed() -> None:
    model = model_of(graph_of())
    with torch.no_grad():
        model.weight("layers.2.mlp.down_proj").fill_(float("nan"))
    assert run(model, outputs=("layers.1.mlp.residual",))["layers.1.mlp.residual"].isfinite().all()
    cache: dict[Any, Any] = {}
    run(model, KVState(SPANS.spans, cache), outputs=("layers.0.mlp.residual",))
    assert {layer for layer, _ in cache} == {0, 1, 2}


def test_values_are_dropped_after_their_last_reader() -> None:
    model = model_of(graph_of())
    values: dict[str, Any] = {
        "ids": IDS.flatten(),
        "positions": torch.arange(20) % 10,
        "rows": torch.arange(20),
    }
    model._run(model._plan(("logits",), True), values, SPANS)
    assert set(values) == {"logits"}


def test_an_unknown_output_is_named() -> None:
    with pytest.raises(GraphError, match=r"has no output or value hidden\.7"):
        run(model_of(graph_of()), outputs=("hidden.7",))


@pytest.mark.parametrize(
    "spans",
    [
        (SpanRows(0, 0, 10, 0),),
        (SpanRows(0, 10, 10, 0), SpanRows(1, 0, 10, 0)),
        (SpanRows(0, 0, 10, 0), SpanRows(1, 9, 11, 0)),
    ],
)
def test_spans_must_cover_the_rows_in_order(spans: tuple[SpanRows, ...]) -> None:
    with pytest.raises(GraphError, match="row"):
        run(model_of(graph_of()), KVState(spans))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"])
def test_every_parameter_learns(architecture: str) -> None:
    model = model_of(
        graph_of(architecture, num_local_experts=2) if "Mix" in architecture else graph_of(architecture)
    )
    loss = torch.nn.functional.cross_entropy(model.logits(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"])
def test_training_under_autocast(architecture: str) -> None:
    model = model_of(graph_of(architecture))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(IDS)
    logits.float().square().mean().backward()
    exact = model.logits(IDS)
    assert (logits.float() - exact).norm() < 0.05 * exact.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_inference_mode_keeps_no_history() -> None:
    with torch.inference_mode():
        assert not model_of(graph_of()).logits(IDS).requires_grad


def test_half_types_keep_rotary_frequencies_exact() -> None:
    model = model_of(graph_of())
    exact = model.weight("rotary.0").clone()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.weight("rotary.0").dtype == torch.float32
    assert torch.equal(half.weight("rotary.0"), exact)
    assert half.logits(IDS).dtype == torch.bfloat16
    assert torch.equal(half.logits(IDS), model_of(graph_of(), dtype=torch.bfloat16).logits(IDS))
    # The copy's steps read its own weights.
    assert model.logits(IDS).dtype == torch.float32


def test_weights_can_be_swapped_for_a_call() -> None:
    model = model_of(graph_of())
    zero = {"norm_weight": torch.zeros(48)}
    swapped = torch.func.functional_call(
        model, zero, (IDS[0], torch.arange(10), torch.arange(10), KVState(SPANS.spans[:1]))
    )
    assert not swapped["logits"].any()


def test_a_quantized_graph_computes_what_its_formats_say() -> None:
    graph = graph_of()
    name = "layers.0.mlp.down_proj"
    stored = replace(graph.weights[name], format="int4", group=32)
    quantized = graph.with_nodes(graph.nodes, weights={**graph.weights, name: stored})
    model, exact = model_of(quantized), model_of(graph)
    assert torch.equal(model.weight(name), round_weight(exact.weight(name).detach(), "int4", 32))
    out = run(model, outputs=("layers.0.mlp.gated", "layers.0.mlp.down"))
    seen = round_activations(out["layers.0.mlp.gated"], "int4", 32)
    torch.testing.assert_close(out["layers.0.mlp.down"], seen @ model.weight(name).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_is_in_the_model_s_dtype(dtype: Any) -> None:
    exported = export_tensors(model_of(graph_of("Phi3ForCausalLM", pad_token_id=0), dtype=dtype))
    assert exported["model.layers.0.self_attn.qkv_proj.weight"].shape == (80, 48)
    assert {a.dtype.name for a in exported.values()} == {str(dtype).removeprefix("torch.")}


def test_loading_reports_each_weight() -> None:
    graph, seen = graph_of(), []
    model_of(graph, on_weight=lambda weight: seen.append(weight.name))
    assert seen == list(graph.weights)
