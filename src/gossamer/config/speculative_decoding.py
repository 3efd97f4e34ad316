"""Speculative decoding: tokens guessed cheaply and verified together in one step of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from gossamer.config.quantization import Quantization
from gossamer.errors import ConfigError

SpeculativeMethod = Literal["ngram", "draft_model", "eagle"]
MOST_SPECULATIVE_TOKENS = 16
MOST_TREE_WIDTH = 4

# Methods of vLLM that are not here: what to ask for instead.
_ELSEWHERE = {
    "eagle3": "eagle, with a head that this project trained",
    "medusa": "eagle, the trained head there is here",
    "mlp_speculator": "eagle, the trained head there is here",
    "mtp": "eagle, or draft_model with any small model of the same tokenizer",
    "deepseek_mtp": "draft_model with any small model of the same tokenizer",
    "suffix": "ngram, which too looks for what the text said before",
    "[ngram]": "ngram",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeDecoding:
    """How tokens are guessed. Outputs are those without it, whatever the method."""

    method: SpeculativeMethod
    """"ngram" (what followed the same words in the text so far), "draft_model" (a small model of the same
    vocabulary) or "eagle" (a trained head over the model's hidden states)."""
    num_speculative_tokens: int = 4
    """Most tokens guessed at once."""
    model: str | None = None
    """Directory or hub id of the draft model or head; ngram has none. None with eagle: the head in the folder
    eagle of the model's own directory."""
    quantization: Quantization | None = None
    """How the draft's weights are stored; None: as the model's."""
    prompt_lookup_min: int = 2
    """Fewest tokens that must match for ngram to guess."""
    prompt_lookup_max: int = 4
    """Most tokens that ngram tries to match."""
    tree_width: int = 1
    """Most ways that guesses may go on from one place. 1: chains; more: trees, where they pay, of what else
    followed the same words (ngram) or of the next best tokens of a greedy request (draft_model, eagle; a
    sampled one has chains). Width is worth little so far: 1% on quoting tasks for ngram, 4% fewer steps with
    the head of gossamer/pocket, whose wider steps cost more than that."""
    adaptive: bool = True
    """Whether guesses grow, shrink and stop with what they bring; False: always the most."""

    def __post_init__(self) -> None:
        if self.method not in get_args(SpeculativeMethod):
            near = _ELSEWHERE.get(self.method) if isinstance(self.method, str) else None
            known = ", ".join(get_args(SpeculativeMethod))
            raise ConfigError(
                f"speculative method {self.method!r} is unknown; choose {known}"
                + (f". Nearest to it: {near}" if near else "")
            )
        for name, least, most in (
            ("num_speculative_tokens", 1, MOST_SPECULATIVE_TOKENS),
            ("tree_width", 1, MOST_TREE_WIDTH),
            ("prompt_lookup_min", 1, 64),
            ("prompt_lookup_max", 1, 64),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ConfigError(f"{name} {value!r} is not a whole number from {least} to {most}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min {self.prompt_lookup_min} is above prompt_lookup_max "
                f"{self.prompt_lookup_max}; lower the one or raise the other"
            )
        if not isinstance(self.adaptive, bool):
            raise ConfigError(f"adaptive {self.adaptive!r} must be true or false")
        if self.model is not None and not (isinstance(self.model, str) and self.model):
            raise ConfigError(f"model {self.model!r} of the draft is not the name of one")
        if self.method == "draft_model" and self.model is None:
            raise ConfigError(
                'the speculative method draft_model needs a "model": the small model of the same vocabulary'
            )
        if self.method == "ngram":
            for name in ("model", "quantization"):
                value = getattr(self, name)
                if value is not None:
                    raise ConfigError(
                        f"the speculative method ngram has no {name}; leave out {name} {value}, or say "
                        '"method": "draft_model"'
                    )

    @classmethod
    def parse(cls, given: str | Mapping[str, Any]) -> SpeculativeDecoding:
        """From vLLM's --speculative-config, JSON text or the mapping it says:
        {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}.

        Without a method a "model" means draft_model, as there. Raises ConfigError for anything else.
        """
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"the speculative configuration is not JSON: {error}; {_EXAMPLE}") from None
        if not isinstance(given, Mapping):
            raise ConfigError(f"the speculative configuration is not a JSON object; {_EXAMPLE}")
        values = dict(given)
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                near = get_close_matches(str(key), known, 1)
                raise ConfigError(
                    f"the speculative configuration has the unknown key {key!r}; "
                    + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
                )
        if "method" not in values:
            if values.get("model") is None:
                raise ConfigError(f'the speculative configuration has no "method"; {_EXAMPLE}')
            values["method"] = "draft_model"
        if isinstance(values.get("quantization"), str):
            values["quantization"] = Quantization.parse(values["quantization"])
        elif not isinstance(values.get("quantization"), Quantization | None):
            raise ConfigError(
                f'quantization {values["quantization"]!r} of the draft is not text such as "int4"'
            )
        if "prompt_lookup_max" in values and "prompt_lookup_min" not in values:
            most = values["prompt_lookup_max"]
            if isinstance(most, int):
                values["prompt_lookup_min"] = min(2, most)
        return cls(**values)


_EXAMPLE = 'say for example {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}'
