"""The server as a process: it loads, is told to stop, and goes in order."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from gossamer.config import EngineConfig
from gossamer.errors import ConfigError, TokenizerError
from gossamer.server.run import serve
from gossamer.server.settings import ServerSettings
from tests.processes import interruptible
from tests.server.serving import STORY, wait_for

SCRIPT = """
import sys, time
from gossamer.llm import engine_config
from gossamer.runtime.local import LocalExecutor
from gossamer.server.run import serve
from gossamer.server.settings import ServerSettings

model, load, step, timeout = sys.argv[1], *map(float, sys.argv[2:])
quick = LocalExecutor.submit
def submit(self, plan):
    time.sleep(step)
    return quick(self, plan)
LocalExecutor.submit = submit
init = LocalExecutor.__init__
def slowly(self, *args, **options):
    time.sleep(load)
    init(self, *args, **options)
LocalExecutor.__init__ = slowly
serve(engine_config(model, threads=1), ServerSettings(port=0, shutdown_timeout=timeout),
      on_ready=lambda engine, url: print(url, flush=True))
"""


@contextmanager
def process(
    model: Path | str, *, load: float = 0.0, step: float = 0.0, timeout: float = 10.0
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SCRIPT, str(model), str(load), str(step), str(timeout)]
    made = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
    try:
        yield made
    finally:
        made.kill()
        made.communicate()


def read_url(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    assert url.startswith("http://"), server.communicate()
    return url


def stream(url: str, tokens: int) -> Iterator[str]:
    body = {"prompt": STORY, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
        yield from (line for line in response.iter_lines() if line)


def test_sigterm_lets_a_request_finish_and_refuses_new_ones(model: Path) -> None:
    with process(model, step=0.02) as server:
        url = read_url(server)
        lines = stream(url, 60)
        next(lines)
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)
        assert httpx.get(f"{url}/health").json() == {"status": "stopping"}
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": STORY})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        server.send_signal(signal.SIGTERM)  # once more changes nothing
        rest = list(lines)
        assert len(rest) == 60 and rest[-1] == "data: [DONE]" and '"length"' in rest[-2]
        assert server.wait(10) == 0
        assert server.stdout is not None and server.stdout.read() == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


@pytest.mark.parametrize(("timeout", "signals"), [(0.2, [signal.SIGTERM]), (30.0, [signal.SIGINT] * 2)])
def test_what_takes_too_long_gets_an_error(
    model: Path, timeout: float, signals: list[signal.Signals]
) -> None:
    with process(model, step=0.05, timeout=timeout) as server:
        lines = stream(read_url(server), 400)
        next(lines)
        for each in signals:
            server.send_signal(each)
            time.sleep(0.1)
        rest = list(lines)
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
        assert server.wait(10) == 0


def test_health_says_503_while_the_model_loads_and_stopping_then_is_in_order(model: Path) -> None:
    with process(model, load=1.5) as server:
        assert server.stderr is not None
        port = 0
        while not port:
            line = server.stderr.readline()
            port = int(line.rsplit(":", 1)[1]) if "listening on" in line else 0
        url = f"http://127.0.0.1:{port}"
        response = httpx.get(f"{url}/health")
        assert (response.status_code, response.json()) == (503, {"status": "loading"})
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": STORY})
        assert refused.status_code == 503 and "loading" in refused.json()["error"]["message"]
        assert httpx.get(f"{url}/metrics").status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0


def test_loading_is_left_off_when_told_to_stop(tmp_path: Path) -> None:
    script = """
import sys, time
from gossamer.cli.main import run
from gossamer.text_engine import TextEngine

def start(config, *, chat_template, progress):
    for done in range(10**6):
        print("loading", flush=True)
        time.sleep(0.05)
        progress(done, 10**6)

TextEngine.start = start
sys.exit(run(["serve", sys.argv[1], "--dtype", "float32", "--no-plan", "--port", "0"]))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stderr is not None
        assert server.stdout.readline() == "loading\n"
        while "listening on" not in server.stderr.readline():
            pass
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=20)
        assert server.returncode == 0 and "Traceback" not in said


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with process(tmp_path) as server:
        _, said = server.communicate(timeout=20)
        assert server.returncode == 1
        assert "GossamerError" in said or "Error" in said.splitlines()[-1]


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            serve(EngineConfig(model="/nowhere"), ServerSettings(port=port))


def test_a_missing_chat_template_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    settings = ServerSettings(port=0, chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(TokenizerError, match="none"):
        serve(EngineConfig(model="/nowhere"), settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000}, {"max_num_queued_reqs": 0}, {"shutdown_timeout": -1}, {"metrics_prefix": "a:b"},
        {"api_key": ""}, {"served_model_name": ""}, {"ping_seconds": 0}, {"max_body_bytes": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServerSettings(**wrong)  # type: ignore[arg-type]


def test_the_key_is_not_shown() -> None:
    assert "sesame" not in repr(ServerSettings(api_key="sesame"))
