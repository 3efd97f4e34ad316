"""A real server on a loopback port, for the tests of this folder."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from gossamer.engine.step import Executor, ExecutorLimits, Handle, StepPlan, StepResult
from gossamer.llm import engine_config
from gossamer.server.app import create_app
from gossamer.server.settings import ServerSettings
from gossamer.text_engine import TextEngine

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.content }} {% endfor %}"
)
STORY = "Once upon a time"


@dataclass
class Live:
    """A running server and ways to talk to it."""

    url: str
    engine: TextEngine
    http: httpx.Client
    sdk: openai.OpenAI
    model: str = "stories"

    def complete(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": STORY, "temperature": 0} | body)

    def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": STORY}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0} | body)

    def metrics(self) -> dict[str, float]:
        """Every metric, summed over its labels."""
        found: dict[str, float] = {}
        for line in self.http.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
                found[name] = found.get(name, 0) + value
        return found

    def idle(self) -> bool:
        """Whether nothing runs, nothing waits and every page is free."""
        now = self.metrics()
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(now[f"gossamer:{name}"] == 0 for name in names)


def wait_for(what: Callable[[], object], seconds: float = 5.0) -> None:
    """Returns once something is true; fails when it does not become so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


def text_engine(model: Path, **options: Any) -> TextEngine:
    return TextEngine.start(engine_config(str(model), threads=1, **options))


@contextmanager
def serving(engine: TextEngine, **settings: Any) -> Iterator[Live]:
    """A server in a thread of this process until the block ends."""
    made = ServerSettings(**({"served_model_name": "stories", "chat_template": TEMPLATE} | settings))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(create_app(engine, made), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        key = made.api_key or "none"
        headers = {"Authorization": f"Bearer {key}"}
        sdk = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20)
        try:
            with httpx.Client(base_url=url, headers=headers, timeout=20) as http, sdk:
                wait_for(lambda: server.started)
                wait_for(lambda: http.get("/health").status_code == 200)
                yield Live(url, engine, http, sdk)
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive()


class Meddler(Executor):
    """An executor that does something before every step of another one."""

    def __init__(self, inner: Executor, before: Callable[[StepPlan], None]) -> None:
        self._inner, self._before = inner, before

    @property
    def limits(self) -> ExecutorLimits:
        return self._inner.limits

    @property
    def draft_limits(self) -> ExecutorLimits | None:
        return self._inner.draft_limits

    def submit(self, plan: StepPlan) -> Handle:
        self._before(plan)
        return self._inner.submit(plan)

    def collect(self, handle: Handle) -> StepResult:
        return self._inner.collect(handle)

    def close(self) -> None:
        self._inner.close()


def meddled(model: Path, before: Callable[[StepPlan], None], **options: Any) -> TextEngine:
    """An engine whose every step begins with a call."""
    started = text_engine(model, **options).started
    return TextEngine(replace(started, executor=Meddler(started.executor, before)))
