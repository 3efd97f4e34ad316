"""config.json is read strictly: nothing that could change the numbers is dropped unnoticed."""

from __future__ import annotations

from typing import Any

import pytest

from gossamer.errors import UnsupportedModelError
from gossamer.graph.families import FAMILIES, build_graph
from gossamer.graph.ir import Graph
from gossamer.graph.weights import leaves

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 8,
    "num_attention_heads": 32,
    "num_hidden_layers": 3,
    "vocab_size": 11,
}
BARE: dict[str, dict[str, Any]] = {
    architecture: {"architectures": [architecture], **SIZES} for architecture in FAMILIES
}
BARE["GPT2LMHeadModel"] |= {"n_embd": 64, "n_head": 32, "n_layer": 3}
for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
    del BARE["GPT2LMHeadModel"][name]


def build(architecture: str = "LlamaForCausalLM", ignore: tuple[str, ...] = (), **fields: Any) -> Graph:
    return build_graph({**BARE[architecture], **fields}, ignore=ignore)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_field_that_is_not_understood_is_named_with_the_way_out(architecture: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"mystery=3 is not understood.*--ignore-config-field mystery"
    ):
        build(architecture, mystery=3)
    plain = build(architecture)
    assert build(architecture, mystery=None, other=False, ids=[], map={}) == plain
    assert build(architecture, mystery=3, ignore=("mystery",)) == plain
    assert build(architecture, torch_dtype="bfloat16", use_cache=True, bos_token_id=1, top_p=0.9) == plain


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_needed_field_is_named_when_absent(architecture: str) -> None:
    for field in set(BARE[architecture]) - {"architectures"}:
        with pytest.raises(UnsupportedModelError, match=f"config.json has no {field}"):
            build(architecture, **{field: None})


def test_several_unknown_fields_are_all_named() -> None:
    with pytest.raises(UnsupportedModelError, match="--ignore-config-field one --ignore-config-field two"):
        build(one=1, two=2)


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (["FooForCausalLM"], "'FooForCausalLM' is unknown; known are GPT2LMHeadModel, Gemma2"),
        (["Gemma3ForConditionalGeneration"], "text-only checkpoint"),
        (["EagleHead"], "serve the model it was trained for"),
        ([], "one name is right"),
        (None, "one name is right"),
        ("LlamaForCausalLM", "one name is right"),
        (["LlamaForCausalLM", "MistralForCausalLM"], "one name is right"),
        ([{}], "is unknown"),
    ],
)
def test_an_architecture_that_is_not_ours_is_named(architectures: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        build(architectures=architectures)


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("hidden_size", 0, "a whole number from 1"),
        ("hidden_size", -8, "a whole number from 1"),
        ("hidden_size", "64", "a whole number from 1"),
        ("hidden_size", True, "a whole number from 1"),
        ("hidden_size", 64.0, "a whole number from 1"),
        ("hidden_size", 65, "65 is not a multiple of 32 heads"),
        ("num_hidden_layers", 10**9, "a whole number from 1 to 1000"),
        ("num_key_value_heads", 5, "num_key_value_heads is 5; a divisor of the 32"),
        ("head_dim", 7, "an even number up to 65536 is right"),
        ("head_dim", 2**31, "an even number up to 65536 is right"),
        ("hidden_size", 2**31, "an even number up to 65536 is right"),
        ("rms_norm_eps", float("nan"), "a number above 0"),
        ("rms_norm_eps", 0, "a number above 0"),
        ("rms_norm_eps", 10**400, "a number above 0"),
        ("rope_theta", float("inf"), "a number above 0"),
        ("rope_theta", 1e300, "no finite frequencies"),
        ("rope_scaling", "linear", "an object or null"),
        ("rope_scaling", {"factor": 2.0}, "has no rope_type"),
        ("rope_scaling", {"type": "spiral"}, "'spiral' is unknown; known are linear, dynamic"),
        ("rope_scaling", {"type": "linear"}, "has no factor"),
        ("rope_scaling", {"type": "linear", "factor": -1}, "a number above 0"),
        ("rope_scaling", {"type": "linear", "factor": 1e308}, "no finite frequencies"),
        ("rope_scaling", {"type": "linear", "factor": 10**400}, "a number above 0"),
        ("rope_scaling", {"type": "linear", "factor": 2, "twist": 1}, "twist is not understood"),
        ("rope_scaling", {"type": "longrope", "short_factor": [1]}, "must be 1 numbers above 0|long_factor"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("hidden_act", "xielu", "one of silu, swish, gelu"),
        ("partial_rotary_factor", 0.5, "understands 1.0 alone"),
        ("quantization_config", {"quant_method": "gptq"}, "not understood"),
        ("is_encoder_decoder", True, "not understood"),
    ],
)
def test_a_value_that_cannot_be_is_refused_saying_what_is_right(field: str, value: Any, right: str) -> None:
    with pytest.raises(UnsupportedModelError, match=right):
        build(**{field: value})


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("Gemma3ForCausalLM", "use_bidirectional_attention", True),
        ("Gemma3ForCausalLM", "attn_logit_softcapping", 50.0),
        ("Gemma2ForCausalLM", "layer_types", ["full_attention"]),
        ("Gemma2ForCausalLM", "layer_types", ["full_attention", [], "chunked_attention"]),
        ("MixtralForCausalLM", "num_experts_per_tok", 9),
        ("MixtralForCausalLM", "num_local_experts", 33_334),  # of 3 layers
        ("Qwen3MoeForCausalLM", "num_experts", 33_334),
        ("Qwen3MoeForCausalLM", "mlp_only_layers", [3]),
        ("Qwen3MoeForCausalLM", "mlp_only_layers", "all"),
        ("GPT2LMHeadModel", "add_cross_attention", True),
    ],
)
def test_what_a_family_does_not_do_is_refused(architecture: str, field: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=field):
        build(architecture, **{field: value})


def test_null_and_absent_differ_where_transformers_says_so() -> None:
    def window(**fields: Any) -> int | None:
        return build("MistralForCausalLM", **fields).kv_groups[0].window

    assert (window(), window(sliding_window=None), window(sliding_window=5)) == (4096, None, 5)

    def caps(**fields: Any) -> set[Any]:
        graph = build("Gemma2ForCausalLM", **fields)
        return {
            n.attrs.get("cap", n.attrs.get("softcap"))
            for n in graph.nodes
            if n.op in ("softcap", "attention")
        }

    assert caps() == {30.0, 50.0}
    assert caps(final_logit_softcapping=None, attn_logit_softcapping=None) == {None}


def test_rotary_fields_of_transformers_5_are_those_of_4() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }  # fmt: skip
    plain = build(head_dim=64, rope_theta=5e5)
    assert build(head_dim=64, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}) == plain
    assert (
        build(head_dim=64, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}, rope_theta=5e5)
        == plain
    )
    stretched = build(head_dim=64, rope_theta=5e5, rope_scaling=scaling)
    assert build(head_dim=64, rope_parameters={"rope_theta": 5e5, **scaling}) == stretched != plain
    half = build("Phi3ForCausalLM", hidden_size=256, partial_rotary_factor=0.5)
    assert build("Phi3ForCausalLM", hidden_size=256, rope_parameters={"partial_rotary_factor": 0.5}) == half
    kinds = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}}
    layers = {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    sliding = {"sliding_attention": {"rope_theta": 5e3, "rope_type": "default"}}
    gemma = build("Gemma3ForCausalLM", head_dim=64, **layers, rope_local_base_freq=5e3)
    assert build("Gemma3ForCausalLM", head_dim=64, rope_parameters=kinds | sliding) == gemma
    for other in ({"rope_theta": 1e4}, kinds, {"full_attention": {"rope_theta": 5e5}}, {"twist": 1}):
        with pytest.raises(UnsupportedModelError, match=r"rope_parameters.* is not understood"):
            build(head_dim=64, rope_parameters=other, rope_theta=5e5)


def test_long_context_picks_the_long_factors_once() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0], "long_factor": [3.0]}
    fields = {"rope_scaling": scaling, "max_position_embeddings": 131072}

    def frequency(context: int | None = None) -> Any:
        graph = build_graph({**BARE["Phi3ForCausalLM"], **fields}, context=context)
        return graph.weights["rotary.0"].expr

    assert frequency() == frequency(4097) != frequency(4096)


def test_layers_of_one_window_share_a_kv_group() -> None:
    graph = build("Gemma3ForCausalLM", num_hidden_layers=7, sliding_window=16)
    assert [(g.layers, g.window) for g in graph.kv_groups] == [((0, 1, 2, 3, 4, 6), 16), ((5,), None)]
    assert {n.weights[0] for n in graph.nodes if n.op == "rope"} == {"rotary.0", "rotary.1"}


def test_a_base_model_s_checkpoint_is_read_under_its_own_names() -> None:
    from gossamer.graph.families.names import fit_names

    graph = build("GPT2LMHeadModel")
    full = {leaf.name for w in graph.weights.values() for leaf in leaves(w.expr)}
    short = {name.removeprefix("transformer.") for name in full}
    fitted = fit_names(graph, short)
    assert {leaf.name for w in fitted.weights.values() for leaf in leaves(w.expr)} == short
    assert fitted.nodes == graph.nodes
    assert fit_names(graph, full) is graph
