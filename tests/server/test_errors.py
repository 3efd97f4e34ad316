"""Every mistake of a client is a 4xx in OpenAI's shape that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.serving import STORY, Live, serving, text_engine


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert "Traceback" not in error["message"] and ".py" not in error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("guided_json", {}),
        ("functions", [{"name": "f"}]),
        ("reasoning_effort", "low"),
        ("audio", {"voice": "a"}),
        ("modalities", ["text", "audio"]),
        ("store", True),
        ("service_tier", "flex"),
        ("chat_template", "{{ 1 }}"),
        ("continue_final_message", True),
        ("temprature", 0),
        ("best_of", 2),
    ],
)
def test_what_is_not_built_or_not_known_is_named(live: Live, param: str, value: Any) -> None:
    error = problem(live.chat(**{param: value}), 400)
    assert error["param"] == param and param in error["message"]
    assert error["code"] in ("unsupported_parameter", "unknown_parameter")


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "store": False},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "modalities": ["text"]},
        {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k"},
        {"max_tokens": 2, "max_completion_tokens": 2, "stop": None, "logit_bias": {}, "n": None},
    ],
)
def test_what_asks_for_nothing_is_taken(live: Live, harmless: dict[str, Any]) -> None:
    assert live.chat(**({"max_tokens": 2} | harmless)).status_code == 200


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_k", -5),
        ("min_p", 2),
        ("presence_penalty", 3),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", 1000),
        ("n", 1.5),
        ("max_tokens", 0),
        ("min_tokens", 100),
        ("seed", 2**70),
        ("stop", [""]),
        ("stop", ["x"] * 65),
        ("stop", 3),
        ("logprobs", 21),
        ("logprobs", True),
        ("logit_bias", {"comma": 1}),
        ("logit_bias", {"5": 101}),
        ("stream_options", {"include_usage": True}),
        ("suffix", "end"),
        ("best_of", 0),
        ("prompt", []),
        ("prompt", 5),
        ("prompt", ["a", 5]),
        ("prompt", [True]),
        ("prompt", None),
    ],
)
def test_values_out_of_range_are_named(live: Live, param: str, value: Any) -> None:
    error = problem(live.complete(**{param: value}), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": [STORY, ""]},
        {"prompt": [10**9]},
        {"prompt": [-1]},
        {"prompt": "\ud800"},
        {"stop_token_ids": [10**9]},
        {"logit_bias": {"1000000": 1}},
        {"temperature": float("nan")},
        {"prompt": [-1], "echo": True},
        {"\ud800": 1},
        {"model": 3},
    ],
)
def test_other_mistakes(live: Live, body: dict[str, Any]) -> None:
    content = json.dumps({"prompt": STORY} | body)
    headers = {"Content-Type": "application/json"}
    problem(live.http.post("/v1/completions", content=content, headers=headers), 400)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"content": "no role"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "tool", "content": "the template refuses it"}],
    ],
)
def test_messages(live: Live, messages: Any) -> None:
    problem(live.chat(messages=messages), 400)
    problem(live.http.post("/tokenize", json={"messages": messages}), 400)


def test_chat_options(live: Live) -> None:
    assert problem(live.chat(top_logprobs=2), 400)["param"] == "top_logprobs"
    assert problem(live.chat(max_tokens=2, max_completion_tokens=3), 400)["param"] == "max_tokens"
    assert problem(live.chat(chat_template_kwargs={"messages": []}), 400)["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(live: Live, stream: bool) -> None:
    error = problem(live.complete(prompt=[5] * 600, stream=stream), 400)
    assert error["code"] == "context_length_exceeded"
    assert "600" in error["message"] and str(live.engine.started.max_model_len) in error["message"]


def test_one_bad_prompt_of_several_runs_none(live: Live) -> None:
    before = live.metrics()["gossamer:prompt_tokens_total"]
    problem(live.complete(prompt=[[5, 6], [5] * 600]), 400)
    assert live.metrics()["gossamer:prompt_tokens_total"] == before


def test_the_sdk_knows_our_errors(live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        live.sdk.completions.create(model="gpt-9", prompt=STORY)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError):
        live.sdk.chat.completions.create(model=live.model, messages=[])
    with pytest.raises(openai.NotFoundError):
        live.sdk.models.retrieve("gpt-9")


def test_what_is_not_our_api(live: Live) -> None:
    assert problem(live.http.get("/v1/nothing"), 404)["code"] == "not_found"
    response = live.http.get("/v1/completions")
    assert problem(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"prompt": "Once', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"prompt": "\xff"}', "application/json"),
        (b'{"prompt": [' + b"1" * 5000 + b"]}", "application/json"),
        (b"[]", "application/json"),
        (b"", "application/json"),
        (b'{"prompt": "Once"}', "text/plain"),
    ],
)
def test_bodies_that_are_no_json_object(live: Live, content: bytes, kind: str) -> None:
    problem(live.http.post("/v1/completions", content=content, headers={"Content-Type": kind}), 400)


def test_bodies_that_are_too_large_without_a_template_and_with_a_key(model: Path) -> None:
    with serving(text_engine(model), max_body_bytes=1000, api_key="sesame", chat_template=None) as live:
        assert problem(live.complete(prompt="a" * 2000), 413)["code"] == "request_too_large"
        chunks = (b"a" * 500 for _ in range(5))
        json_type = {"Content-Type": "application/json"}
        problem(live.http.post("/v1/completions", content=chunks, headers=json_type), 413)
        assert live.complete(max_tokens=1).status_code == 200

        assert problem(live.chat(), 400)["code"] == "no_chat_template"

        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
            for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
                response = httpx.get(f"{live.url}{path}", headers=headers)
                assert problem(response, 401)["code"] == "invalid_api_key"
            response = httpx.post(f"{live.url}/v1/completions", json={"prompt": STORY}, headers=headers)
            problem(response, 401)
            assert httpx.get(f"{live.url}/health", headers=headers).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0).models.list()
        assert [model.id for model in live.sdk.models.list()] == [live.model]


def test_a_broken_template_does_not_show_the_machine(model: Path) -> None:
    with serving(text_engine(model), chat_template="{{ nothing.at.all }}{% for %}") as live:
        assert str(model) not in problem(live.chat(), 400)["message"]
