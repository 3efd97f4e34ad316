"""The whole way, from prompts to tokens: the engine plans ahead of a device, and says what the CPU says."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer import LLM, SamplingParams

PROMPTS = ["Once upon a time", "Lily and Tom went to the park", "One day, a big dog"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6),
    SamplingParams(temperature=0.8, seed=3, max_tokens=5, repetition_penalty=1.2),
    SamplingParams(temperature=0.9, seed=4, max_tokens=9),
]


@pytest.mark.slow
@pytest.mark.parametrize("guess", [None, {"method": "ngram"}], ids=["plain", "ngram"])
@pytest.mark.parametrize("name", ["stories260K", pytest.param("gossamer/pocket", marks=pytest.mark.gpu)])
def test_tokens_are_those_of_the_cpu(
    name: str, guess: dict[str, str] | None, request: pytest.FixtureRequest
) -> None:
    model: str | Path = name
    if name == "stories260K":
        model = request.getfixturevalue("shared") / "models" / name
        if not Path(model).is_dir():
            pytest.skip("the model stories260K is not there")
    said = []
    for backend in ("cpu", "cuda"):
        llm = LLM(
            model,
            backend=backend,
            kv_dtype="f32",
            max_num_seqs=4,
            max_num_batched_tokens=32,
            max_model_len=64,
            speculative_config=guess,
        )
        said.append([output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)])
    assert said[0] == said[1]
