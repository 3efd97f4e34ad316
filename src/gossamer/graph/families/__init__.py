"""Model families: config.json -> Graph. One file per family; the table below is all there is to find one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from gossamer.errors import UnsupportedModelError
from gossamer.graph.families import gemma, gpt2, llama, mistral, mixtral, phi, qwen2, qwen3, qwen_moe
from gossamer.graph.families.fields import Fields
from gossamer.graph.ir import Graph

__all__ = ["FAMILIES", "build_graph"]

FAMILIES: dict[str, Callable[[Fields, str, int | None], Graph]] = {
    "GPT2LMHeadModel": gpt2.build,
    "Gemma2ForCausalLM": gemma.build_gemma2,
    "Gemma3ForCausalLM": gemma.build_gemma3,
    "LlamaForCausalLM": llama.build,
    "MistralForCausalLM": mistral.build,
    "MixtralForCausalLM": mixtral.build,
    "Phi3ForCausalLM": phi.build,
    "Qwen2ForCausalLM": qwen2.build,
    "Qwen3ForCausalLM": qwen3.build,
    "Qwen3MoeForCausalLM": qwen_moe.build,
}

_COMMONEST = "LlamaForCausalLM"

# Architectures that look like one of ours and are not, with what to use instead.
_NEIGHBOURS = {
    "EagleHead": (
        "it is a draft head, not a model; serve the model it was trained for and name the head in its "
        "speculative configuration"
    ),
    "Gemma3ForConditionalGeneration": (
        "it reads images too, under other tensor names; a text-only checkpoint (Gemma3ForCausalLM, "
        "such as google/gemma-3-1b-it) is right"
    ),
}


def build_graph(
    config: Mapping[str, Any],
    *,
    name: str = "model",
    context: int | None = None,
    ignore: Collection[str] = (),
) -> Graph:
    """The graph that a config.json describes.

    context: longest sequence that will run, where it matters (dynamic and long rotary scalings); ignore:
    fields to treat as absent. Raises UnsupportedModelError naming the architecture or the field.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise UnsupportedModelError(f"config.json: architectures is {architectures!r}; one name is right")
    architecture = str(architectures[0])
    if architecture in _NEIGHBOURS:
        raise UnsupportedModelError(
            f"architecture {architecture!r} is not supported: {_NEIGHBOURS[architecture]}"
        )
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {architecture!r} is unknown; known are {', '.join(sorted(FAMILIES))}. "
            + _lacks(Fields(config, ignore), name, context)
        )
    return FAMILIES[architecture](Fields(config, ignore), name, context)


def _lacks(fields: Fields, name: str, context: int | None) -> str:
    """What of an unknown architecture's config.json the commonest family would not know how to compute."""
    try:
        FAMILIES[_COMMONEST](fields, name, context)
    except UnsupportedModelError as error:
        # How to ignore a field is no advice here: the architecture is another all the same.
        return f"Read as a {_COMMONEST}: {str(error).split('; if it does not matter')[0]}"
    return (
        f"All its fields are those of a {_COMMONEST}: if its layers are too, write that as its architecture "
        "in config.json"
    )
