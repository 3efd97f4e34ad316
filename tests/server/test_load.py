"""Many clients, clients that leave, a full queue: nothing is lost and every page comes back."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from gossamer.config import DynamicBatching
from gossamer.server import frontend
from tests.server.serving import STORY, Live, meddled, serving, text_engine, wait_for


def test_32_mixed_requests_at_once_answer_as_alone(live: Live) -> None:
    bodies: list[dict[str, Any]] = [
        {
            "prompt": [STORY, "The big dog", "Lily and Tom"][i % 3],
            "max_tokens": 5 + i,
            "temperature": [0, 0.9][i % 2],
            "seed": i,
            "n": 1 + i % 3,
            "stream": i % 4 == 3,
        }
        for i in range(32)
    ]

    def texts(response: httpx.Response, body: dict[str, Any]) -> list[str]:
        assert response.status_code == 200
        if not body["stream"]:
            return [choice["text"] for choice in response.json()["choices"]]
        out = [""] * body["n"]
        for event in response.text.split("\n\n")[:-2]:
            for choice in json.loads(event.removeprefix("data: "))["choices"]:
                out[choice["index"]] += choice["text"]
        return out

    alone = [texts(live.complete(**body), body) for body in bodies]

    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=live.url, timeout=20) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    together = [texts(response, body) for response, body in zip(asyncio.run(burst()), bodies, strict=True)]
    assert together == alone


class Brake:
    """A step that waits while the brake is on, and counts."""

    def __init__(self) -> None:
        self.seconds, self.steps, self.fail = 0.0, 0, 0

    def __call__(self, _plan: object) -> None:
        self.steps += 1
        time.sleep(self.seconds)
        if self.fail:
            self.fail -= 1
            raise RuntimeError("the kernel met /secret/path")


@pytest.fixture(scope="module")
def brake() -> Brake:
    return Brake()


@pytest.fixture(scope="module")
def _slow(model: Path, brake: Brake) -> Any:
    engine = meddled(model, brake, max_num_seqs=2)
    with serving(engine, max_num_queued_reqs=4, ping_seconds=0.1) as live:
        yield live


@pytest.fixture
def slow(_slow: Live, brake: Brake) -> Any:
    """Two run, four wait; each step as slow as the brake says."""
    brake.seconds = 0.02
    yield _slow
    brake.seconds = brake.fail = 0
    wait_for(_slow.idle)
    _slow.engine.engine.check()


def dial(live: Live, **body: Any) -> socket.socket:
    """A connection that has sent a long request."""
    content = json.dumps({"prompt": STORY, "max_tokens": 400, "ignore_eos": True} | body).encode()
    host, port = live.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=5)
    head = f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + content)
    return client


def leave(live: Live, body: dict[str, Any], after: int) -> None:
    """Sends a request and hangs up after so many bytes of the answer; after 0, once it is queued."""
    with dial(live, **body) as client:
        got = 0
        while got < after:
            data = client.recv(100)
            assert data
            got += len(data)
        if not after:
            wait_for(lambda: not live.idle())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_leaves_while_its_request_runs(slow: Live, stream: bool, n: int) -> None:
    aborted = slow.metrics()["gossamer:request_success_total"]
    leave(slow, {"stream": stream, "n": n}, after=300 if stream else 0)
    wait_for(slow.idle)
    assert slow.metrics()["gossamer:request_success_total"] == aborted + 1


def test_clients_that_leave_while_they_wait(slow: Live) -> None:
    leave(slow, {"n": 6, "stream": True}, after=10)  # refused: more than the queue holds
    leave(slow, {"n": 4, "stream": True}, after=300)
    leave(slow, {"prompt": [5] * 500, "n": 2}, after=0)
    wait_for(slow.idle)
    assert slow.complete(max_tokens=2).status_code == 200


def test_a_crowd_that_vanishes(live: Live) -> None:
    crowd = [dial(live, stream=True) for _ in range(100)]
    wait_for(lambda: live.metrics()["gossamer:num_requests_waiting"])
    for client in crowd:
        client.close()
    assert live.complete(max_tokens=2).status_code == 200
    wait_for(live.idle)


def test_a_burst_past_the_queue_is_told_to_come_back(slow: Live, brake: Brake) -> None:
    brake.seconds = 0.05

    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=slow.url, timeout=20) as client:
            body = {"prompt": STORY, "max_tokens": 3}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(40)))

    responses = asyncio.run(burst())
    refused = [response for response in responses if response.status_code == 429]
    assert {response.status_code for response in responses} == {200, 429}
    assert 4 <= len(responses) - len(refused) <= 12
    for response in refused:
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
    too_many = slow.complete(n=5)
    assert too_many.status_code == 400 and too_many.json()["error"]["param"] == "n"


def test_prompts_that_wait_have_as_many_tokens_as_the_plan_counts(
    slow: Live, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    brake.seconds = 0.05
    kv_tokens = slow.engine.started.memory.kv_tokens
    monkeypatch.setattr(frontend, "PROMPT_TOKENS", 50 / kv_tokens)  # of all prompts together

    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=slow.url, timeout=20) as client:
            body = {"prompt": list(range(5, 25)), "max_tokens": 3}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(4)))

    refused = [response for response in asyncio.run(burst()) if response.status_code == 429]
    assert 1 <= len(refused) <= 2 and "tokens of at most 50" in refused[0].json()["error"]["message"]
    alone = slow.complete(prompt=list(range(5, 60)))
    assert alone.status_code == 400 and "55 tokens" in alone.json()["error"]["message"]


def test_silence_is_filled_with_comments(slow: Live, brake: Brake) -> None:
    brake.seconds = 0.25
    text = slow.complete(max_tokens=2, stream=True).text
    assert ": ping\n\n" in text and text.endswith("data: [DONE]\n\n")


def test_a_failed_step_fails_its_requests_and_the_next_one_is_served(slow: Live, brake: Brake) -> None:
    brake.fail = 1
    response = slow.complete(max_tokens=5)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "generation_failed" and "secret" not in response.text
    with slow.http.stream(
        "POST", "/v1/completions", json={"prompt": STORY, "max_tokens": 50, "stream": True}
    ) as r:
        lines = r.iter_lines()
        assert "text" in next(lines)
        brake.fail = 1
        rest = [line for line in lines if line.startswith("data:")]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert rest[-1] == "data: [DONE]"
    assert slow.complete(max_tokens=2).status_code == 200
    assert slow.http.get("/health").status_code == 200


def test_an_engine_that_only_fails_is_said_to_be_down(model: Path) -> None:
    brake = Brake()
    brake.fail = 1000
    with serving(meddled(model, brake)) as live:
        statuses = [live.complete(max_tokens=2).status_code for _ in range(5)]
        assert statuses[0] == 500 and statuses[-1] == 503
        assert live.http.get("/health").json() == {"status": "failed"}
        assert live.http.get("/health").status_code == 503
        refused = live.complete(max_tokens=2)
        assert "retry-after" in refused.headers and "secret" not in refused.text
        assert live.http.get("/metrics").status_code == 200


def test_a_goal_out_of_reach_is_said_once(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = text_engine(model, dynamic_batching=DynamicBatching(itl_goal_ms=0.001))
    with caplog.at_level("WARNING", logger="gossamer.server"), serving(engine) as live:
        for _ in range(2):
            assert live.complete(prompt="Once", max_tokens=40, ignore_eos=True).status_code == 200
        wait_for(live.idle)
    said = [record.message for record in caplog.records if "--itl-goal-ms" in record.message]
    assert len(said) == 1 and "raise the goal" in said[0]
