"""--speculative-config: vLLM's spelling, and mistakes in it that say what would do."""

from __future__ import annotations

from typing import Any

import pytest

from gossamer.config import EngineConfig, Quantization, SpeculativeDecoding, StaticBatching
from gossamer.errors import ConfigError
from gossamer.llm import engine_config


def test_what_vllm_takes() -> None:
    found = SpeculativeDecoding.parse(
        '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}'
    )
    assert found == SpeculativeDecoding(method="ngram", num_speculative_tokens=5, prompt_lookup_max=4)
    draft = SpeculativeDecoding.parse({"model": "a/b", "quantization": "int4-g64"})
    assert (draft.method, draft.model) == ("draft_model", "a/b")
    assert draft.quantization == Quantization(format="int4", group=64)
    shortest = SpeculativeDecoding.parse({"method": "ngram", "prompt_lookup_max": 1})
    assert (shortest.prompt_lookup_min, shortest.prompt_lookup_max) == (1, 1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ngram", "is not JSON.*say for example"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("{}", 'no "method"'),
        ({"method": "medusa"}, "unknown; choose ngram, draft_model, eagle. Nearest to it: eagle"),
        ({"method": "eagle3", "model": "x"}, "Nearest to it: eagle"),
        ({"method": 5}, "method 5 is unknown"),
        ({"method": ["ngram"]}, "unknown"),
        ({"method": "ngram", "num_speculative_token": 3}, "did you mean 'num_speculative_tokens'"),
        ({"method": "ngram", 7: 3}, "unknown key 7"),
        ({"method": "ngram", "num_speculative_tokens": 17}, "from 1 to 16"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "from 1 to 16"),
        ({"method": "ngram", "num_speculative_tokens": "4"}, "'4' is not a whole number"),
        ({"method": "ngram", "num_speculative_tokens": True}, "True is not a whole number"),
        ({"method": "ngram", "tree_width": 0}, "tree_width 0 is not a whole number from 1 to 4"),
        ({"method": "ngram", "tree_width": 5}, "tree_width 5"),
        ({"method": "ngram", "tree_width": None}, "tree_width None"),
        ({"method": "ngram", "prompt_lookup_min": 5}, "above prompt_lookup_max 4"),
        ({"method": "ngram", "prompt_lookup_max": None}, "prompt_lookup_max None"),
        ({"method": "ngram", "model": "x"}, "ngram has no model"),
        ({"method": "ngram", "quantization": "int4"}, "ngram has no quantization"),
        ({"method": "ngram", "adaptive": 1}, "adaptive 1"),
        ({"method": "draft_model"}, 'needs a "model"'),
        ({"method": "draft_model", "model": 3}, "model 3"),
        ({"method": "draft_model", "model": "x", "quantization": 4}, "quantization 4"),
        ({"method": "draft_model", "model": "x", "quantization": "int5"}, "int5"),
    ],
)
def test_mistakes_say_what_would_do(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SpeculativeDecoding.parse(given)


def test_from_python() -> None:
    found = engine_config("gossamer/pocket", speculative_config={"method": "ngram"})
    assert found.speculative_decoding == SpeculativeDecoding(method="ngram")
    assert engine_config("gossamer/pocket").speculative_decoding is None


def test_combinations_that_cannot_be() -> None:
    ngram = SpeculativeDecoding(method="ngram")
    with pytest.raises(ConfigError, match="--speculative-config"):
        EngineConfig(
            model="m", continuous_batching=None, static_batching=StaticBatching(), speculative_decoding=ngram
        )
    with pytest.raises(ConfigError, match="belongs to PagedAttention"):
        engine_config("gossamer/pocket", swap_bytes=1 << 20, paged_attention=None)
    with pytest.raises(ConfigError, match="swaps no pages"):
        engine_config("gossamer/pocket", swap_bytes=1 << 20, backend="reference")
    assert EngineConfig(model="m", backend="reference", speculative_decoding=ngram).speculative_decoding
