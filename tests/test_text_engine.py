"""Where tokens and text meet: updates of several tokens, grammars, scored prompts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gossamer import LLM, SamplingParams, StructuredOutputs
from gossamer.engine.engine import Update
from gossamer.engine.request import TokenLogprob
from gossamer.errors import RequestError, TokenizerError
from gossamer.runtime.null import Delayed, NullExecutor
from gossamer.text_engine import TextEngine, TextUpdate

STORY = "Once upon a time, there was a little girl named Lily. She loved to play."


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "overlapping"])
def llm(shared: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """A real tokenizer over an executor that draws tokens by a hash, steps one by one or two in flight."""
    made = LLM(str(shared / "models" / "stories260K"), max_model_len=256, max_num_seqs=8)
    started = made.engine.started
    null = NullExecutor(started.executor.limits)
    made.engine = TextEngine(replace(started, executor=Delayed(null) if request.param else null))
    yield made
    made.engine.close()


def told(engine: TextEngine, params: SamplingParams, tokens: list[int], sizes: list[int]) -> list[TextUpdate]:
    """What is said of an output whose tokens come in updates of such sizes."""
    name = engine.new_id()
    engine.submit(name, (1,), params)
    updates: list[TextUpdate] = []
    at = 0
    for size in [*sizes, len(tokens)]:
        part = tokens[at : at + size]
        at += len(part)
        scores = [TokenLogprob(token, -float(i)) for i, token in enumerate(part, at)]
        last = "length" if at == len(tokens) else None
        update = engine._text(Update(name, 0, part, scores, last, None, {}))
        if update is None:
            break
        updates.append(update)
    engine.abort(name)
    return updates


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["girl", "e girl n", "Lily. She", ", there w", "play."])
def test_a_stop_string_cuts_updates_of_several_tokens(llm: LLM, stop: str, include: bool) -> None:
    """Text, tokens and log-probabilities are those of updates of one token each."""
    engine, chance = llm.engine, random.Random(stop)
    tokens = list(engine.encode(STORY, add_special_tokens=False))
    params = SamplingParams(stop=(stop,), include_stop_str_in_output=include, logprobs=0, max_tokens=200)
    single = told(engine, params, tokens, [1] * len(tokens))
    count = sum(len(update.tokens) for update in single)
    assert "".join(update.text for update in single) == STORY[: STORY.index(stop) + len(stop) * include]
    assert single[-1].stop_reason == stop and single[-1].finish_reason == "stop"
    for _ in range(20):
        updates = told(engine, params, tokens, [chance.randint(1, 6) for _ in tokens])
        assert "".join(update.text for update in updates) == "".join(update.text for update in single)
        assert [token for update in updates for token in update.tokens] == tokens[:count]
        assert all(len(update.logprobs or ()) == len(update.tokens) for update in updates)
        assert (updates[-1].finish_reason, updates[-1].stop_reason) == ("stop", stop)


def test_stop_strings_end_outputs_whose_next_tokens_are_on_their_way(llm: LLM) -> None:
    prompts = ["It is", "Go", "Both:"]
    plain = llm.generate(prompts, SamplingParams(max_tokens=60, seed=1), use_tqdm=False)
    texts = [request.outputs[0].text for request in plain]
    stops = [text[20:24] for text in texts]
    params = [SamplingParams(max_tokens=60, seed=1, stop=(stop,)) for stop in stops]
    for request, text, stop in zip(llm.generate(prompts, params, use_tqdm=False), texts, stops):
        (output,) = request.outputs
        assert output.text == text[: text.index(stop)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_structured_outputs(llm: LLM) -> None:
    wanted = [
        StructuredOutputs(regex="[0-9]{2}:[0-9]{2}"),
        StructuredOutputs(choice=("left", "right")),
        StructuredOutputs(json={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}),
    ]
    params = [
        SamplingParams(structured_outputs=one, max_tokens=200, n=2, seed=i) for i, one in enumerate(wanted)
    ]
    time, side, pair = llm.generate(["It is", "Go", "Both:"], params, use_tqdm=False)
    for output in time.outputs:
        assert output.finish_reason == "stop" and re.fullmatch(r"\d\d:\d\d", output.text)
    assert {output.text for output in side.outputs} <= {"left", "right"}
    for output in pair.outputs:
        assert [type(each) for each in json.loads(output.text)] == [bool, bool]


def test_a_marker_spelled_in_a_grammar_is_text(llm: LLM) -> None:
    """The tokenizer makes one special token of "</s>"; a grammar means its characters."""
    params = SamplingParams(structured_outputs=StructuredOutputs(choice=("</s>",)), max_tokens=20)
    output = llm.generate("Say", params, use_tqdm=False)[0].outputs[0]
    assert output.text == "</s>" and output.finish_reason == "stop"


def test_the_end_token_where_the_grammar_may_stop_and_the_request_lets_it(llm: LLM) -> None:
    engine = llm.engine
    end = engine.eos_ids[0]
    for ignore, may_end in ((False, True), (True, False)):
        grammar = engine.compile(
            SamplingParams(structured_outputs=StructuredOutputs(regex="a*"), ignore_eos=ignore)
        )
        assert grammar is not None
        mask = grammar().masks(None)[0]
        assert mask is not None and bool(mask[end // 8] >> end % 8 & 1) == may_end


def test_what_cannot_compile_leaves_nothing_behind(llm: LLM) -> None:
    bad = SamplingParams(structured_outputs=StructuredOutputs(regex="("))
    with pytest.raises(RequestError, match="regex cannot be used"):
        llm.generate(["a", "b"], [SamplingParams(), bad], use_tqdm=False)
    assert not llm.engine.has_work()
    llm.engine.engine.check()


def test_a_model_without_a_tokenizer_has_no_grammars(llm: LLM) -> None:
    tokenizer, llm.engine.tokenizer = llm.engine.tokenizer, None
    try:
        with pytest.raises(TokenizerError):
            llm.engine.compile(SamplingParams(structured_outputs=StructuredOutputs(regex="a")))
    finally:
        llm.engine.tokenizer = tokenizer


def test_prompt_logprobs(llm: LLM) -> None:
    one, two = llm.generate(
        [STORY, "The"], SamplingParams(prompt_logprobs=1, n=2, max_tokens=3), use_tqdm=False
    )
    for output in (one, two):
        scores = output.prompt_logprobs
        assert scores is not None and scores[0] is None and len(scores) == len(output.prompt_ids)
        assert [each.token for each in scores[1:] if each is not None] == list(output.prompt_ids[1:])
    assert llm.generate("The", SamplingParams(), use_tqdm=False)[0].prompt_logprobs is None


def test_the_salt_is_a_text(llm: LLM) -> None:
    assert llm.generate("The", SamplingParams(), cache_salt="a", use_tqdm=False)[0].num_cached_tokens == 0
    with pytest.raises(RequestError, match="cache_salt"):
        llm.generate("The", SamplingParams(), cache_salt=5, use_tqdm=False)  # type: ignore[arg-type]
