"""The byte plan against the truth: every configuration in a process of its own, under load, at its peak.

    python -m benchmarks.memory_plan [--only PATTERN] [--json]

The truth is the anonymous and shared memory of the process (RssAnon + RssShmem of /proc/PID/status), from its
first breath on, sampled every few milliseconds while it loads and serves a random load that uses all its
pages. The plan is made before, from config.json alone. Shapes with dummy weights are looked for in
../shared/models/shapes; without them gossamer/pocket alone is measured.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory_cases import Case, cases

_SAMPLE = 0.003  # seconds
_MIB = 1 << 20
_REQUESTS = 96  # at least, or two for every place


@dataclass(slots=True)
class Result:
    """One configuration: the plan's bytes, the most that the process held, and seconds that it took."""

    case: Case
    planned: int
    engine: int
    actual: int
    seconds: float
    error: str = ""

    @property
    def ratio(self) -> float:
        """Of the truth to the plan: above 1 the plan is no bound."""
        return self.actual / self.planned


def measure(case: Case) -> Result:
    """Plans a configuration, runs it and watches it."""
    from gossamer.llm import engine_config
    from gossamer.planner.memory import plan_memory
    from gossamer.planner.model import open_planned

    config = engine_config(**case.options)
    plan = plan_memory(open_planned(config), config, kind=case.kind)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.memory_plan", "--run", json.dumps(case.options)]
        if case.kind == "server":
            command = [sys.executable, "-m", "gossamer", "serve", "--port", "0", "--json", *case.flags()]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not os.environ.get("VERBOSE") else None,
            env={**os.environ, "GOSSAMER_CACHE": cache},
            text=True,
        ) as process:
            watch = _Watch(process.pid)
            error = ""
            try:
                if case.kind == "server":
                    assert process.stdout is not None
                    lines = iter(process.stdout.readline, "")
                    ready = json.loads("".join(_until_closed(lines)))
                    _http_load(ready["url"], ready["memory"], case)
                    process.send_signal(signal.SIGTERM)
                _, said = process.communicate(timeout=1800)
                if process.returncode:
                    last = (said or "").strip().splitlines() or ["it said nothing"]
                    error = f"ended with {process.returncode}: {last[-1][:200]}"
            finally:
                process.kill()
                watch.stop()
    return Result(case, plan.total, plan.engine.total, watch.peak, time.perf_counter() - start, error)


def _until_closed(lines: Iterator[str]) -> Iterator[str]:
    """The lines of one JSON object."""
    for line in lines:
        yield line
        if line.startswith("}"):
            return


class _Watch:
    """The most anonymous and shared memory that a process had."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._path, self._ended = Path(f"/proc/{pid}/status"), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_SAMPLE):
            try:
                lines = self._path.read_text().splitlines()
            except OSError:
                return
            found = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))]
            self.peak = max(self.peak, sum(found) << 10)


def _library_load(options: dict[str, Any]) -> None:
    """Serves random requests of token ids until every KV page was used, a few of them special."""
    from gossamer.engine.request import SamplingParams, StructuredOutputs
    from gossamer.llm import engine_config
    from gossamer.text_engine import TextEngine

    engine = TextEngine.start(engine_config(**options))
    if os.environ.get("VERBOSE"):
        print("started", engine.started.memory, engine.started.process / _MIB, file=sys.stderr)
    rng, places = random.Random(0), engine.started.config.max_num_seqs
    vocab, longest = engine.started.graph.vocab, engine.started.max_model_len
    if engine.tokenizer is not None:
        schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
        for wanted in (StructuredOutputs(json=schema), StructuredOutputs(regex="[a-z]{1,8}")):
            ids = [rng.randrange(vocab) for _ in range(8)]
            engine.submit(engine.new_id(), ids, SamplingParams(max_tokens=8, structured_outputs=wanted))
    # Outputs so long that the first still runs when the last place has its prompt.
    config = engine.started.config
    steps = 8 + places * longest // config.max_num_batched_tokens
    output = max(8, min(steps, longest // 2))
    left, sent = int(1.1 * engine.started.memory.kv_tokens), 0
    while left > 0 or sent < min(_REQUESTS, 2 * places) or engine.has_work():
        while engine.engine.stats().waiting < 4 and (left > 0 or sent < min(_REQUESTS, 2 * places)):
            prompt = longest - output - rng.randint(0, longest // 8)
            params = SamplingParams(
                max_tokens=output,
                temperature=rng.choice((0.0, 0.8)),
                logprobs=rng.choice((None, None, 5, 20)),
                prompt_logprobs=rng.choice((None,) * 7 + (20,)) if sent >= places else None,
                n=rng.choice((1, 1, 1, 2)),
                ignore_eos=True,
            )
            engine.submit(engine.new_id(), [rng.randrange(vocab) for _ in range(prompt)], params)
            left, sent = left - prompt - output, sent + 1
        engine.step()
    engine.close()


def _http_load(url: str, memory: dict[str, int], case: Case) -> None:
    """The same over HTTP: streams and answers at once, from several threads."""
    rng = random.Random(0)
    longest = case.options["max_model_len"]
    vocab = json.loads((Path(_directory(case)) / "config.json").read_text())["vocab_size"]
    left = [int(1.1 * memory["kv_tokens"])]
    lock = threading.Lock()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with lock:
                if left[0] <= 0:
                    return
                prompt = rng.randint(longest // 3, longest - 8)
                left[0] -= prompt + 8
            body = {
                "model": case.options["model"],
                "prompt": [rng.randrange(vocab) for _ in range(prompt)],
                "max_tokens": 8,
                "temperature": 0.8,
                "stream": rng.random() < 0.5,
                "logprobs": rng.choice((None, 3)),
            }
            _post(url, body)

    from gossamer.checkpoint.hub import resolve_model
    from gossamer.checkpoint.tokenizer import has_tokenizer

    if has_tokenizer(resolve_model(case.options["model"])):
        words = {"model": case.options["model"], "prompt": "Once", "max_tokens": 8}
        _post(url, words | {"structured_outputs": {"regex": "[a-z]{1,8}"}})
    threads = [threading.Thread(target=client, args=(rng.random(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _directory(case: Case) -> Path:
    from gossamer.checkpoint.hub import resolve_config

    return resolve_config(case.options["model"])


def _post(url: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.read()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="*", help="configurations whose name matches")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        _library_load(json.loads(given.run))
        return
    results = []
    for case in cases():
        if fnmatch.fnmatch(case.name, given.only):
            results.append(measure(case))
            if not given.json:
                print(_line(results[-1]), flush=True)
    ratios = sorted(result.ratio for result in results)
    if not ratios:
        parser.error(f"no configuration is called {given.only}; all: {', '.join(c.name for c in cases())}")
    summary = {
        "configurations": len(ratios), "worst": ratios[-1], "least": ratios[0],
        "median": statistics.median(ratios), "errors": [r.error for r in results if r.error],
    }  # fmt: skip
    if given.json:
        print(json.dumps({**summary, "runs": [_as_dict(result) for result in results]}))
    else:
        print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in summary.items()))
    sys.exit(bool(summary["errors"]) or ratios[-1] > 1)


def _as_dict(result: Result) -> dict[str, Any]:
    return {
        "name": result.case.name, "kind": result.case.kind, "planned": result.planned,
        "engine": result.engine, "actual": result.actual, "ratio": result.ratio, "error": result.error,
    }  # fmt: skip


def _line(result: Result) -> str:
    beside = (result.actual - result.engine) / _MIB
    return (
        f"{result.case.name:44} plan {result.planned / _MIB:9.1f} MiB  actual {result.actual / _MIB:9.1f}  "
        f"ratio {result.ratio:.4f}  beside the engine {(result.planned - result.engine) / _MIB:6.1f} "
        f"/ {beside:6.1f}  {result.seconds:5.1f} s {result.error}"
    )


if __name__ == "__main__":
    main()
