"""Structured outputs, scored prompts and the best of several, over HTTP.

The engine is real, its executor none: it draws tokens by a hash, so that only the masks make sense of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from gossamer.runtime.null import NullExecutor
from gossamer.text_engine import TextEngine
from tests.server.serving import STORY, Live, serving, text_engine, wait_for
from tests.server.test_errors import problem

SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 12}, "sex": {"enum": ["boy", "girl"]}},
    "required": ["age", "sex"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def hashing(model: Path) -> Iterator[Live]:
    started = text_engine(model, max_model_len=512).started
    limits = started.executor.limits
    with serving(TextEngine(replace(started, executor=NullExecutor(limits)))) as live:
        yield live
        wait_for(live.idle)
        live.engine.engine.check()


def conforms(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["age", "sex"]
        and type(value["age"]) is int
        and 1 <= value["age"] <= 12
        and value["sex"] in ("boy", "girl")
    )


def only(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice


def streamed(response: httpx.Response) -> tuple[str, str]:
    text, reason = "", ""
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            reason = choice["finish_reason"] or reason
    return text, reason


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["structured_outputs", "response_format"])
@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(hashing: Live, seed: int, how: str, stream: bool) -> None:
    asked = {
        "structured_outputs": {"json": SCHEMA},
        "response_format": {"type": "json_schema", "json_schema": {"name": "child", "schema": SCHEMA}},
    }
    response = hashing.chat(**{how: asked[how]}, seed=seed, max_tokens=400, stream=stream)
    if stream:
        text, reason = streamed(response)
    else:
        choice = only(response)
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert reason == "stop" and conforms(text)


def test_expression_choice_and_grammar(hashing: Live) -> None:
    for wanted, pattern in (
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["yes", "no", "maybe not"]}, "yes|no|maybe not"),
        ({"grammar": 'start: "(" start ")" | /[xy]{2}/'}, r"(\(*)[xy]{2}(\)*)"),
    ):
        choice = only(hashing.complete(structured_outputs=wanted, max_tokens=100))
        assert choice["finish_reason"] == "stop" and re.fullmatch(pattern, choice["text"]), choice


def test_every_output_and_prompt_has_a_grammar_of_its_own(hashing: Live) -> None:
    answer = hashing.complete(
        prompt=[STORY, "The"],
        n=3,
        structured_outputs={"regex": "[a-z]{5}[0-9]"},
        max_tokens=40,
        temperature=1,
    ).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(texts) == 6 and all(re.fullmatch("[a-z]{5}[0-9]", text) for text in texts)


def test_stop_strings_and_the_length_end_a_grammar_too(hashing: Live) -> None:
    choice = only(hashing.complete(structured_outputs={"regex": "a{3}b.*"}, stop="aab", max_tokens=20))
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", "aab")
    choice = only(hashing.complete(structured_outputs={"regex": "a{50}"}, max_tokens=5))
    assert choice["finish_reason"] == "length" and set(choice["text"]) == {"a"}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
        ("structured_outputs", {"structured_outputs": {"xml": "a"}}),
        ("structured_outputs", {"structured_outputs": {"json": {"enum": list(range(5000))}}}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("response_format", {"response_format": {"type": "xml"}}),
        (
            "response_format",
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        ),
        ("guided_regex", {"guided_regex": "a"}),
        ("guided_json", {"guided_json": {}}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
        ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
        ("prompt_logprobs", {"prompt_logprobs": 1, "echo": True, "logprobs": 1}),
        ("n", {"n": 2, "echo": True, "logprobs": 1, "stream": True}),
        ("best_of", {"best_of": 1, "n": 2}),
        ("best_of", {"best_of": 129}),
        ("best_of", {"best_of": 2, "stream": True}),
        ("max_tokens", {"max_tokens": 0}),
        ("cache_salt", {"cache_salt": "x" * 2000}),
    ],
)
def test_mistakes_are_named(hashing: Live, param: str, body: dict[str, Any]) -> None:
    assert problem(hashing.complete(**body), 400)["param"] == param


def test_a_bomb_holds_nobody_up(hashing: Live) -> None:
    """While hostile grammars are refused, others are answered."""
    bomb = {"json": {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrst"]}}
    found: list[httpx.Response] = []
    with httpx.Client(base_url=hashing.url, timeout=20) as other:
        body = {"prompt": STORY, "structured_outputs": bomb}
        thread = Thread(target=lambda: found.append(other.post("/v1/completions", json=body)))
        thread.start()
        answers = 0
        while thread.is_alive():
            only(hashing.complete(max_tokens=4))
            answers += 1
        thread.join()
    assert "structured_outputs" in problem(found[0], 400)["message"]
    assert answers >= 2


def test_a_grammar_that_fails_on_the_way_fails_alone(hashing: Live) -> None:
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
    error = problem(hashing.complete(structured_outputs={"json": many}, max_tokens=20), 400)
    assert "structured_outputs" in error["message"]
    only(hashing.complete(max_tokens=4))


def test_prompt_logprobs(hashing: Live) -> None:
    ids = hashing.http.post("/tokenize", json={"prompt": STORY}).json()["tokens"]
    scores = only(hashing.complete(prompt_logprobs=2, max_tokens=2))["prompt_logprobs"]
    assert len(scores) == len(ids) and scores[0] is None
    for token, entry in zip(ids[1:], scores[1:]):
        assert entry[str(token)]["logprob"] <= 0 and len(entry) in (2, 3)
    chat = hashing.chat(prompt_logprobs=0, max_tokens=2).json()
    assert chat["prompt_logprobs"][0] is None and len(chat["prompt_logprobs"]) > 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_scores_the_prompt(hashing: Live, max_tokens: int, stream: bool) -> None:
    ids = hashing.http.post("/tokenize", json={"prompt": STORY}).json()["tokens"]
    body = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "stream": stream, "ignore_eos": True}
    response = hashing.complete(**body)
    lists: dict[str, list[Any]] = {}
    if stream:
        text = ""
        for line in response.text.splitlines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                text += choice["text"]
                for name, part in (choice["logprobs"] or {}).items():
                    lists.setdefault(name, []).extend(part)
    else:
        choice = only(response)
        text, lists = choice["text"], choice["logprobs"]
        assert response.json()["usage"]["completion_tokens"] == max_tokens
    assert text.startswith(STORY) and (max_tokens or text == STORY)
    assert {len(part) for part in lists.values()} == {len(ids) + max_tokens}
    assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
    assert all(value <= 0 for value in lists["token_logprobs"][1:])
    assert lists["text_offset"] == sorted(lists["text_offset"])
    assert choice["finish_reason"] == "length"


def test_the_best_of_several(live: Live) -> None:
    """Against all of them, asked for with the same seed."""
    body = {"temperature": 1, "seed": 5, "max_tokens": 8}
    every = live.complete(**body, n=6, logprobs=0).json()["choices"]

    def mean(choice: Any) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return math.fsum(values) / len(values)

    every.sort(key=mean, reverse=True)
    answer = live.complete(**body, n=2, best_of=6).json()
    assert [choice["text"] for choice in answer["choices"]] == [choice["text"] for choice in every[:2]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])


def test_cached_tokens_are_told(hashing: Live) -> None:
    details = hashing.complete(max_tokens=2, cache_salt="mine").json()["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 0}
