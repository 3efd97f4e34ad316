"""What the prefix cache gains and costs: times to first tokens with and without it, one request at a time.

chat: each turn's prompt is the whole conversation so far; few-shot: all prompts begin alike; nothing: none
do. With and without are two engines on one program, which take turns; prompts of different rounds begin
differently, so that each round starts cold.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from gossamer.bench.measure import RecordingExecutor, recording, run_step
from gossamer.bench.memory import memory_figures
from gossamer.bench.workload import uncached
from gossamer.config import EngineConfig
from gossamer.engine.request import SamplingParams
from gossamer.errors import ConfigError
from gossamer.runtime.start import Started
from gossamer.text_engine import TextEngine

__all__ = ["WORKLOADS", "PrefixWork", "bench_prefix", "check_cache"]

WORKLOADS = ("chat", "few-shot", "nothing")
_TAG = 4  # tokens that no other round's prompts begin with


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixWork:
    """input_len: tokens of a few-shot prompt and of a chat's second turn, the part `shared` of them known
    before. requests: in a round, of each workload; a chat has `turns`. output_len: tokens of each answer."""

    input_len: int = 1024
    output_len: int = 16
    requests: int = 8
    turns: int = 4
    shared: float = 0.8
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("input_len", 64),
            ("output_len", 1),
            ("requests", 2),
            ("turns", 2),
            ("rounds", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least {least}")
        if not 0 < self.shared < 1:
            raise ConfigError(f"shared {self.shared} must be between 0 and 1")
        if self.message < 1:
            raise ConfigError(
                f"{self.input_len} tokens, {100 * self.shared:.0f} % of them shared, leave no room for a "
                f"message beside answers of {self.output_len}; raise --input-len or lower --output-len"
            )

    @property
    def known(self) -> int:
        """Tokens of the shared part."""
        return int(self.input_len * self.shared)

    @property
    def message(self) -> int:
        """Tokens that a turn adds to the answer before it."""
        return self.input_len - self.known - self.output_len

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, its answer included."""
        return (
            max(self.input_len, self.known + (self.turns - 1) * (self.message + self.output_len))
            + self.output_len
        )


def check_cache(config: EngineConfig) -> None:
    """Raises ConfigError for a configuration without a prefix cache to measure."""
    if config.paged_attention is None:
        raise ConfigError("the prefix cache shares pages; drop --no-paged-attention")
    if config.prefix_cache is None:
        raise ConfigError("it runs with the prefix cache and without; drop --no-enable-prefix-caching")


@dataclass(slots=True)
class _Side:
    engine: TextEngine
    recorder: RecordingExecutor


@dataclass(slots=True)
class _Run:
    """Of one workload's round: seconds to first tokens where something could be shared (or of all, where
    nothing is), and of everything; tokens of prompts and of them in the cache; answers."""

    ttft: list[float]
    seconds: float
    prompt_tokens: int
    hit_tokens: int
    answers: list[tuple[int, ...]]


def bench_prefix(
    started: Started,
    work: PrefixWork,
    text: Sequence[int] | None = None,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report that `gossamer bench prefix --json` prints. started: with the cache on. text: tokens that
    prompts are pieces of; None: random ones. ratio: with over without, the median over rounds."""
    with_, without = (
        _Side(*recording(s)) for s in (started, replace(started, config=uncached(started.config)))
    )
    source = _Source(work, started.graph.vocab, text)
    report: dict[str, Any] = {}
    for name in WORKLOADS:
        done: list[tuple[_Run, _Run]] = []
        for index in range(work.rounds + 1):  # the first warms up
            progress(f"{name}, round {index} of {work.rounds}")
            order = (with_, without) if index % 2 else (without, with_)
            seed = work.seed + index
            runs = {id(side): _run(side, source, name, seed) for side in order}
            pair = runs[id(with_)], runs[id(without)]
            assert pair[0].answers == pair[1].answers, "the prefix cache changed tokens"
            if index:
                done.append(pair)
        report[name] = _figures(done)
    return report | {
        "input_len": work.input_len,
        "output_len": work.output_len,
        "shared": work.shared,
        "requests": work.requests,
        "turns": work.turns,
        "rounds": work.rounds,
        "memory": memory_figures(started.memory),
    }


def _figures(done: Sequence[tuple[_Run, _Run]]) -> dict[str, Any]:
    on, off = zip(*done)
    prompts = sum(run.prompt_tokens for run in on)
    return {
        "ttft_ms_with": round(1e3 * median(t for run in on for t in run.ttft), 4),
        "ttft_ms_without": round(1e3 * median(t for run in off for t in run.ttft), 4),
        "ttft_ratio": round(median(median(a.ttft) / median(b.ttft) for a, b in done), 4),
        "total_s_with": round(median(run.seconds for run in on), 4),
        "total_s_without": round(median(run.seconds for run in off), 4),
        "total_ratio": round(median(a.seconds / b.seconds for a, b in done), 4),
        "hit_rate": round(sum(run.hit_tokens for run in on) / prompts, 4),
    }


class _Source:
    """Pieces of text, or random tokens."""

    def __init__(self, work: PrefixWork, vocab: int, text: Sequence[int] | None) -> None:
        if text is not None and len(text) < work.longest:
            raise ConfigError(
                f"the text has {len(text)} tokens, {work.longest} at least are needed; give more"
            )
        self.work = work
        self._vocab = vocab
        self._text = text

    def piece(self, rng: random.Random, count: int) -> list[int]:
        """count tokens."""
        if self._text is None:
            return [rng.randrange(self._vocab) for _ in range(count)]
        start = rng.randrange(len(self._text) - count + 1)
        return list(self._text[start : start + count])

    def head(self, rng: random.Random, count: int) -> list[int]:
        """The same, beginning as no other piece does."""
        return [rng.randrange(self._vocab) for _ in range(_TAG)] + self.piece(rng, count - _TAG)


def _prompts(source: _Source, name: str, seed: int) -> Iterator[tuple[int, list[int], bool]]:
    """(conversation, what is new of its prompt, whether the rest may be known before)."""
    work, rng = source.work, random.Random(f"{name} {seed}")
    if name == "nothing":
        for i in range(work.requests):
            yield i, source.head(rng, work.input_len), True
    elif name == "few-shot":
        head = source.head(rng, work.known)
        for i in range(work.requests):
            yield i, head + source.piece(rng, work.input_len - work.known), i > 0
    else:
        chats = -(-work.requests // work.turns)
        for turn in range(work.turns):
            for chat in range(chats):
                new = source.piece(rng, work.message) if turn else source.head(rng, work.known)
                yield chat, new, turn > 0


def _run(side: _Side, source: _Source, name: str, seed: int) -> _Run:
    work = source.work
    params = SamplingParams(temperature=0.0, max_tokens=work.output_len, ignore_eos=True)
    so_far: dict[int, list[int]] = {}
    run = _Run([], 0.0, 0, 0, [])
    hits = _hits(side)
    for chat, new, counts in _prompts(source, name, seed):
        prompt = so_far.setdefault(chat, [])
        prompt += new
        answer: list[int] = []
        first = 0.0
        began = time.perf_counter()
        side.engine.submit(side.engine.new_id(), prompt, params)
        while side.engine.has_work():
            _, updates = run_step(side.engine, side.recorder)
            for update in updates:
                if not answer and update.tokens:
                    first = time.perf_counter() - began
                answer += update.tokens
        run.seconds += time.perf_counter() - began
        run.prompt_tokens += len(prompt)
        run.answers.append(tuple(answer))
        if counts:
            run.ttft.append(first)
        prompt += answer
    run.hit_tokens = _hits(side) - hits
    return run


def _hits(side: _Side) -> int:
    return side.engine.engine.stats().prefix_hits
