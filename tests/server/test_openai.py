"""The openai SDK against the server: it parses every answer into OpenAI's own types."""

from __future__ import annotations

import json

import pytest

import gossamer
from gossamer import LLM, SamplingParams
from tests.server.serving import STORY, Live

GREEDY = ", there was a little girl named Lily"


def test_a_completion(live: Live) -> None:
    answer = live.sdk.completions.create(model=live.model, prompt=STORY, max_tokens=10, temperature=0)
    assert (answer.object, answer.model) == ("text_completion", live.model)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (GREEDY, "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        5,
        10,
        15,
    )


def test_a_streamed_completion_is_the_same_text(live: Live) -> None:
    chunks = list(
        live.sdk.completions.create(
            model=live.model, prompt=STORY, max_tokens=10, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks[:-1]) == GREEDY
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-2:] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 10
    assert len({c.id for c in chunks}) == 1


def test_chat(live: Live) -> None:
    answer = live.sdk.chat.completions.create(
        model=live.model,
        messages=[{"role": "user", "content": STORY}],
        max_completion_tokens=10,
        temperature=0,
    )
    assert answer.object == "chat.completion"
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content
    parts = live.sdk.chat.completions.create(
        model=live.model,
        messages=[{"role": "user", "content": [{"type": "text", "text": STORY}]}],
        max_completion_tokens=10,
        temperature=0,
    )
    assert parts.choices[0].message.content == message.content


def test_a_streamed_chat(live: Live) -> None:
    stream = live.sdk.chat.completions.create(
        model=live.model, messages=[{"role": "user", "content": STORY}], max_tokens=6, temperature=0, n=2,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in mine[1:])
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["length"]
        assert mine[-1].finish_reason == "length" and mine[-1].delta.content is None
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_the_stream_on_the_wire(live: Live) -> None:
    response = live.complete(max_tokens=3, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_chat_runs_to_the_end_of_the_context_without_a_limit(live: Live) -> None:
    answer = live.chat(ignore_eos=True, min_tokens=100).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == live.engine.started.max_model_len


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_every_kind(live: Live, stream: bool) -> None:
    ids = live.engine.encode(STORY)
    for prompt, count in ((STORY, 1), (list(ids), 1), ([STORY, "The cat"], 2), ([list(ids)], 1)):
        texts = [""] * count * 2
        response = live.complete(prompt=prompt, n=2, max_tokens=10, stream=stream)
        if stream:
            events = [e.removeprefix("data: ") for e in response.text.split("\n\n")][:-2]
            for choice in (json.loads(event)["choices"][0] for event in events):
                texts[choice["index"]] += choice["text"]
        else:
            texts = [choice["text"] for choice in response.json()["choices"]]
            assert response.json()["usage"]["completion_tokens"] == 20 * count
        assert texts[:2] == [GREEDY, GREEDY]
        assert all(texts)


def test_echo(live: Live) -> None:
    assert live.complete(max_tokens=10, echo=True).json()["choices"][0]["text"] == STORY + GREEDY
    ids = list(live.engine.encode(STORY))
    text = live.complete(prompt=ids, max_tokens=10, echo=True).json()["choices"][0]["text"]
    assert text.endswith(STORY + GREEDY)
    streamed = live.complete(max_tokens=1, echo=True, stream=True).text
    assert json.loads(streamed.split("\n\n")[0].removeprefix("data: "))["choices"][0]["text"] == STORY + ","


def test_stop_strings_across_token_borders(live: Live) -> None:
    choice = live.complete(max_tokens=40, stop="girl na").json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (", there was a little ", "stop")
    assert choice["stop_reason"] == "girl na"
    kept = live.complete(max_tokens=40, stop=["nowhere", "girl na"], include_stop_str_in_output=True)
    assert kept.json()["choices"][0]["text"] == ", there was a little girl na"
    streamed = live.complete(max_tokens=40, stop=["girl na"], stream=True).text.split("\n\n")[:-2]
    parts = [json.loads(event.removeprefix("data: "))["choices"][0] for event in streamed]
    assert "".join(part["text"] for part in parts) == ", there was a little "
    assert parts[-1]["finish_reason"] == "stop"


def test_stop_tokens_and_min_tokens(live: Live) -> None:
    fourth = live.engine.encode(STORY + GREEDY)[5 + 3]
    choice = live.complete(max_tokens=20, stop_token_ids=[fourth]).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", fourth)
    answer = live.complete(max_tokens=20, min_tokens=10, stop_token_ids=[fourth]).json()
    assert answer["usage"]["completion_tokens"] >= 10


def test_seeds_repeat_and_differ(live: Live) -> None:
    def texts(seed: int | None) -> list[str]:
        answer = live.complete(temperature=1.0, seed=seed, n=3, max_tokens=20).json()
        return [choice["text"] for choice in answer["choices"]]

    first = texts(7)
    assert texts(7) == first
    assert len(set(first)) == 3
    assert texts(8) != first
    assert texts(None) != texts(None)


def test_logit_bias_and_penalties_change_the_answer(live: Live) -> None:
    comma = live.engine.encode(STORY + ",")[-1]
    banned = live.complete(max_tokens=10, logit_bias={str(comma): -100}).json()["choices"][0]["text"]
    assert not banned.startswith(",")
    plain = live.complete(max_tokens=60).json()["choices"][0]["text"]
    for penalty in ({"repetition_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert live.complete(max_tokens=60, **penalty).json()["choices"][0]["text"] != plain
    narrow = {"temperature": 1.0, "seed": 1, "max_tokens": 10}
    for one in ({"top_k": 1}, {"top_p": 0.0001}, {"min_p": 1.0}):
        assert live.complete(**narrow, **one).json()["choices"][0]["text"] == GREEDY


def test_completion_logprobs(live: Live) -> None:
    answer = live.sdk.completions.create(
        model=live.model, prompt=STORY, max_tokens=10, temperature=0, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.top_logprobs and logprobs.text_offset
    assert "".join(logprobs.tokens) == GREEDY
    assert logprobs.token_logprobs is not None and all(-20 < value <= 0 for value in logprobs.token_logprobs)
    for token, value, top, offset in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset, strict=True
    ):
        assert len(top) == 3 and top[token] == max(top.values()) == value
        assert GREEDY[offset:].startswith(token)
    chosen_alone = live.complete(max_tokens=2, logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"]
    assert [len(top) for top in chosen_alone] == [1, 1]


def test_streamed_logprobs_are_those_of_the_whole(live: Live) -> None:
    whole = live.complete(max_tokens=10, logprobs=2).json()["choices"][0]["logprobs"]
    events = live.complete(max_tokens=10, logprobs=2, stream=True).text.split("\n\n")[:-2]
    parts = [json.loads(event.removeprefix("data: "))["choices"][0]["logprobs"] for event in events]
    assert {name: [item for part in parts for item in part[name]] for name in whole} == whole


def test_chat_logprobs(live: Live) -> None:
    answer = live.sdk.chat.completions.create(
        model=live.model, messages=[{"role": "user", "content": STORY}], max_tokens=5, temperature=0,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert len(entry.top_logprobs) == 2


def test_models(live: Live) -> None:
    assert [model.id for model in live.sdk.models.list()] == [live.model]
    assert live.sdk.models.retrieve(live.model).id == live.model


def test_the_server_says_what_the_library_says(live: Live, model: object) -> None:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=30)
    want = LLM(str(model), threads=1).generate(STORY, params, use_tqdm=False)[0].outputs[0].text
    assert live.complete(temperature=0.8, seed=5, max_tokens=30).json()["choices"][0]["text"] == want


def test_tokenize_and_back(live: Live) -> None:
    answer = live.http.post("/tokenize", json={"prompt": STORY, "return_token_strs": True}).json()
    assert tuple(answer["tokens"]) == live.engine.encode(STORY)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == live.engine.started.max_model_len
    plain = live.http.post("/tokenize", json={"prompt": STORY, "add_special_tokens": False}).json()["tokens"]
    assert live.http.post("/detokenize", json={"tokens": plain}).json() == {"prompt": STORY}
    messages = [{"role": "user", "content": STORY}]
    assert live.http.post("/tokenize", json={"messages": messages}).json()["count"] >= len(plain)


def test_version_and_description(live: Live) -> None:
    assert live.http.get("/version").json() == {"version": gossamer.__version__}
    assert "CompletionRequest" in live.http.get("/openapi.json").json()["components"]["schemas"]
    assert live.http.head("/health").status_code == 200
