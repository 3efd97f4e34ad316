"""Speculation from the front door: with drafts, outputs are those without, to the last log-probability."""

from __future__ import annotations

from typing import Any

from gossamer import LLM, SamplingParams

PROMPTS = ["Once upon a time there was a little dog.", "The cat sat. The cat sat. The cat", "One day,"]


def test_outputs_are_the_same_with_prompt_lookup() -> None:
    given: dict[str, Any] = {"max_model_len": 192, "max_num_seqs": 3, "quantization": "int8"}
    lookup = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1}
    params = [
        SamplingParams(temperature=0, max_tokens=48, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=4, max_tokens=48, repetition_penalty=1.2),
        SamplingParams(temperature=0.7, top_p=0.9, seed=9, max_tokens=48, logprobs=2),
    ]
    plain = LLM("gossamer/pocket", **given)
    drafted = LLM("gossamer/pocket", speculative_config=lookup, **given)
    wanted, found = plain.generate(PROMPTS, params), drafted.generate(PROMPTS, params)
    for one, other in zip(wanted, found, strict=True):
        assert one.outputs == other.outputs
    assert drafted.engine.engine.stats().accepted > 0
