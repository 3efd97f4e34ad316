"""Speculation in a plan: which methods a model has, and what their guesses cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gossamer.checkpoint.heads import HEAD_FOLDER
from gossamer.checkpoint.hub import POCKET, POCKET_HALF
from gossamer.config import EngineConfig, SpeculativeDecoding
from gossamer.errors import ConfigError
from gossamer.graph.families.eagle import build_eagle
from gossamer.passes.pipeline import run_passes
from gossamer.planner.model import PlannedModel
from gossamer.planner.roofline import Speculation
from gossamer.runtime.draft import draft_config, has_head
from gossamer.runtime.sizing import KVPlan
from gossamer.runtime.start import load_planned_graph

__all__ = ["known_methods", "parse_acceptance", "speculation_of", "speculations"]

_DRAFTS = {POCKET: POCKET_HALF}  # a student drafts for its teacher
_METHODS = ("ngram", "draft_model", "eagle")


def known_methods(model: PlannedModel) -> dict[str, SpeculativeDecoding]:
    """The methods that need nothing but what there is: ngram always, a draft where one is known, a head where
    one lies in the model's folder."""
    found = {"ngram": SpeculativeDecoding(method="ngram")}
    if model.name in _DRAFTS:
        found["draft_model"] = SpeculativeDecoding(method="draft_model", model=_DRAFTS[model.name])
    if (model.directory / HEAD_FOLDER / "config.json").is_file():
        found["eagle"] = SpeculativeDecoding(method="eagle")
    return found


def parse_acceptance(texts: Sequence[str]) -> dict[str, float]:
    """From METHOD=RATE. Raises ConfigError for anything else."""
    found = {}
    for text in texts:
        method, _, rate = text.partition("=")
        try:
            value = float(rate)
        except ValueError:
            value = -1.0
        if method not in _METHODS or not 0 <= value <= 1:
            raise ConfigError(
                f"acceptance {text!r} is not METHOD=RATE with a method of {', '.join(_METHODS)} and a "
                "rate from 0 to 1, such as ngram=0.6: how likely a guess is right that follows right ones"
            )
        found[method] = value
    return found


def speculations(
    model: PlannedModel, acceptance: Mapping[str, float], lengths: Sequence[int]
) -> list[SpeculativeDecoding | None]:
    """What a search tries: none, and each method of which the acceptance is known, at each length of guesses.

    Raises ConfigError for a method that this model has not.
    """
    known = known_methods(model)
    for method in acceptance:
        if method not in known:
            raise ConfigError(
                f"{model.name} has nothing that drafts by {method}; "
                + ("name its draft model" if method == "draft_model" else "train a head, or name it,")
                + f" with --speculative-config, or leave out --acceptance {method}"
            )
    found: list[SpeculativeDecoding | None] = [None]
    for method in acceptance:
        found += [
            SpeculativeDecoding(
                method=known[method].method, model=known[method].model, num_speculative_tokens=n
            )
            for n in lengths
        ]
    return found


def speculation_of(model: PlannedModel, config: EngineConfig, acceptance: float) -> Speculation:
    """What `predict` must know of a configuration's guesses. Raises what opening the draft raises."""
    own = draft_config(config, KVPlan(16, 1, config.max_model_len or model.graph.max_positions))
    if own is None:
        return Speculation(acceptance=acceptance)
    graph = build_eagle(model.graph) if has_head(config) else load_planned_graph(own)[0]
    return Speculation(acceptance=acceptance, draft=run_passes(graph, own)[0])
