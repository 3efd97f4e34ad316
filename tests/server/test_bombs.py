"""Hostile grammars at a server that has other work: each is refused soon, and nobody else notices."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from gossamer.engine import grammar_compiler
from gossamer.runtime.null import NullExecutor
from gossamer.text_engine import TextEngine
from tests.engine.test_structured_output import BOMBS, LETTERS
from tests.server.serving import STORY, Live, serving, text_engine, wait_for
from tests.server.test_errors import problem

KINDS = ["intersection", "doubling", "chain of rules", "circle", "repeats", "parentheses", "far away", "enum"]
STALL = 0.25  # seconds that a stream may pause while bombs go off
STEP = 0.002


@pytest.fixture(scope="module")
def stepping(model: Path) -> Iterator[Live]:
    """An engine that takes its time for a step, so that a stream lasts as long as the bombs do."""
    started = text_engine(model, max_model_len=512).started
    executor = NullExecutor(started.executor.limits, cost=lambda plan: STEP)
    with serving(TextEngine(replace(started, executor=executor))) as live:
        live.complete(structured_outputs={"choice": ["a"]}, max_tokens=1)  # the worker is there
        yield live
        wait_for(live.idle)
        live.engine.engine.check()


class Stream(Thread):
    """A request that runs until it is told to stop, and how long its longest pause was."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live, self.pause, self.chunks, self.stopped = live, 0.0, 0, False
        self.start()
        wait_for(lambda: self.chunks > 3)

    def run(self) -> None:
        body = {"prompt": STORY, "stream": True, "max_tokens": 480, "ignore_eos": True}
        with httpx.Client(base_url=self.live.url, timeout=20) as http:
            while not self.stopped:
                with http.stream("POST", "/v1/completions", json=body) as response:
                    last = 0.0
                    for line in response.iter_lines():
                        if self.stopped:
                            break
                        if line.startswith("data: {"):
                            now = time.perf_counter()
                            self.pause = max(self.pause, now - last if last else 0.0)
                            last = now
                            self.chunks += 1

    def end(self) -> float:
        self.stopped = True
        self.join()
        return self.pause


def post(live: Live, wanted: dict[str, Any], found: list[tuple[httpx.Response, float]]) -> Thread:
    content = json.dumps({"prompt": STORY, "max_tokens": 4, "structured_outputs": wanted})

    def run() -> None:
        before = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{live.url}/v1/completions", content=content, headers=headers, timeout=20)
        found.append((response, time.perf_counter() - before))

    thread = Thread(target=run)
    thread.start()
    return thread


def crowding() -> float:
    """How much longer than its CPU time a moment's work takes here: 1 where the machine is ours."""
    before, spent = time.perf_counter(), time.thread_time()
    while time.thread_time() - spent < 0.1:
        pass
    return max(1.0, (time.perf_counter() - before) / 0.1)


def forget_refusals(live: Live) -> None:
    """So that the same bomb goes off again."""
    grammars = live.engine._grammars
    assert grammars is not None
    grammars._refused.clear()


def slow_bomb(name: str) -> dict[str, Any]:
    """A grammar that uses up all the time there is."""
    return {"json": {"allOf": [{"type": "string", "pattern": f".*{c}{name}.*"} for c in LETTERS]}}


@pytest.mark.parametrize("name", KINDS)
def test_a_bomb_is_refused_within_a_second_and_no_stream_stalls(stepping: Live, name: str) -> None:
    """Once in three tries: others' work on the machine stops a stream as well."""
    seen = []
    for _ in range(3):
        crowd = crowding()
        stream, found = Stream(stepping), list[tuple[httpx.Response, float]]()
        post(stepping, BOMBS[name], found).join()
        pause = stream.end()
        crowd = max(crowd, crowding())
        ((response, took),) = found
        assert "structured_outputs" in problem(response, 400)["message"]
        if took < 1 * crowd and pause < STALL * crowd:
            return
        seen.append((took, pause, crowd))
        forget_refusals(stepping)
    pytest.fail(f"seconds until refused, a stream's longest pause, how crowded it was: {seen}")


def two_spinning() -> float:
    """Seconds that two processes need for 0.3 s of CPU time each, which is all that a bomb may use."""
    code = "import time\nwhile time.process_time() < 0.3: pass"
    before = time.perf_counter()
    for process in [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]:
        process.wait()
    return time.perf_counter() - before


def test_four_at_once_take_about_a_second(stepping: Live) -> None:
    """Once in three tries, and as many times longer as the machine is slower for others' work."""
    slowest, pauses = list[float](), list[float]()
    for again in range(3):
        found = list[tuple[httpx.Response, float]]()
        stream = Stream(stepping)
        spinning = two_spinning()
        threads = [post(stepping, slow_bomb(f"four{again}{i}"), found) for i in range(4)]
        for thread in threads:
            thread.join()
        spinning = max(spinning, two_spinning())
        pauses.append(stream.end())
        assert ["0.3 s" in problem(response, 400)["message"] for response, _ in found] == [True] * 4
        slowest.append(max(took for _, took in found))
        if slowest[-1] < max(1.5, 4 * spinning) and pauses[-1] < max(STALL, spinning):
            return
    pytest.fail(f"four bombs took {slowest} s, the stream paused {pauses} s")


def test_an_honest_grammar_overtakes_a_flood(stepping: Live) -> None:
    found, mine = list[tuple[httpx.Response, float]](), list[tuple[httpx.Response, float]]()
    threads = [post(stepping, slow_bomb(f"flood{i}"), found) for i in range(12)]
    wait_for(lambda: stepping.engine.compiling >= 12)
    post(stepping, {"regex": "[a-z]{12}x"}, mine).join()
    refused = len(found)
    for thread in threads:
        thread.join()
    assert mine[0][0].status_code == 200 and refused <= 8
    assert [response.status_code for response, _ in found] == [400] * 12


def test_more_than_may_wait_are_told_to_come_back(stepping: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "WAITING", 2)
    found = list[tuple[httpx.Response, float]]()
    threads = [post(stepping, slow_bomb(f"many{i}"), found) for i in range(8)]
    for thread in threads:
        thread.join()
    codes = [response.status_code for response, _ in found]
    assert set(codes) == {400, 429}
    late = next(response for response, _ in found if response.status_code == 429)
    assert "try again" in problem(late, 429)["message"] and late.headers["Retry-After"]
    assert stepping.complete(max_tokens=2).status_code == 200


def test_one_bomb_from_many_clients_is_tried_once(stepping: Live) -> None:
    crowd = crowding()
    found = list[tuple[httpx.Response, float]]()
    threads = [post(stepping, slow_bomb("same"), found) for _ in range(12)]
    for thread in threads:
        thread.join()
    assert all(response.status_code == 400 and took < 1 * max(crowd, crowding()) for response, took in found)
