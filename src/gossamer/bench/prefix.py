"""What the prefix cache gains and costs: times to first tokens with and without it, one request at a time.

chat: each turn's prompt is the whole conversation so far; few-shot: all prompts begin alike; nothing: none
do. With and without are two engines, each on half of one program's pages, which take turns at every request:
what else the machine does meets both alike. Each round's prompts begin differently, so that it starts cold.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from gossamer.bench.memory import memory_figures
from gossamer.bench.workload import uncached
from gossamer.config import EngineConfig
from gossamer.engine.request import SamplingParams
from gossamer.engine.step import Executor, ExecutorLimits, Handle, StepPlan, StepResult
from gossamer.errors import ConfigError, MemoryBudgetError
from gossamer.runtime.start import Started
from gossamer.text_engine import TextEngine

__all__ = ["WORKLOADS", "HalfExecutor", "PrefixWork", "bench_prefix", "check_cache"]

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


class HalfExecutor:
    """Half of an executor's pages, for an engine of its own."""

    def __init__(self, executor: Executor, *, upper: bool) -> None:
        limits = executor.limits
        self._executor = executor
        self._limits = replace(limits, pages=tuple(n // 2 for n in limits.pages), swap_pages=())
        self._first = [n // 2 if upper else 0 for n in limits.pages]

    @property
    def limits(self) -> ExecutorLimits:
        """With half of the pages, and no slower tier."""
        return self._limits

    @property
    def draft_limits(self) -> ExecutorLimits | None:
        """None: nothing speculates here."""
        return None

    def submit(self, plan: StepPlan) -> Handle:
        """Moves every page to its half."""
        spans = tuple(
            replace(
                span,
                tables=tuple(
                    array("i", [page + first if page >= 0 else page for page in table])
                    for table, first in zip(span.tables, self._first, strict=True)
                ),
            )
            for span in plan.spans
        )
        ops = tuple(
            replace(op, source=op.source + self._first[op.group], target=op.target + self._first[op.group])
            for op in plan.kv_ops
        )
        return self._executor.submit(replace(plan, spans=spans, kv_ops=ops))

    def collect(self, handle: Handle) -> StepResult:
        """Passes the result on."""
        return self._executor.collect(handle)

    def close(self) -> None:
        """Closes the executor below."""
        self._executor.close()


@dataclass(slots=True)
class _Side:
    """One of the two, and what came of its newest request: seconds to the first token and of all; its
    answer."""

    engine: TextEngine
    first: float = 0.0
    seconds: float = 0.0
    answer: tuple[int, ...] = ()

    def run(self, prompt: Sequence[int], params: SamplingParams) -> None:
        answer: list[int] = []
        began = first = time.perf_counter()
        self.engine.submit(self.engine.new_id(), prompt, params)
        while self.engine.has_work():
            for update in self.engine.step():
                if not answer and update.tokens:
                    first = time.perf_counter()
                answer += update.tokens
        self.seconds = time.perf_counter() - began
        self.first, self.answer = first - began, tuple(answer)


@dataclass(slots=True)
class _Pairs:
    """(with, without) of every request: seconds of all, and to the first token where something was known
    before (of all, where nothing is). Tokens of prompts, and of those found."""

    total: list[tuple[float, float]] = field(default_factory=list)
    ttft: list[tuple[float, float]] = field(default_factory=list)
    prompt_tokens: int = 0
    hit_tokens: int = 0


def bench_prefix(
    started: Started,
    work: PrefixWork,
    text: Sequence[int] | None = None,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report that `gossamer bench prefix --json` prints. started: with the cache on. text: tokens that
    prompts are pieces of; None: random ones. Ratios: with over without, medians over pairs of the same
    request. Raises MemoryBudgetError where half of the pages hold no conversation.
    """
    limits = started.executor.limits
    held = min(limits.pages) // 2 * limits.page_size
    if held < work.longest:
        raise MemoryBudgetError(
            f"half of the KV memory holds {held} tokens, the longest conversation has {work.longest}; raise "
            "--kv-bytes or lower --input-len"
        )
    with_, without = (
        _Side(
            TextEngine(replace(started, config=config, executor=HalfExecutor(started.executor, upper=upper)))
        )
        for upper, config in ((False, started.config), (True, uncached(started.config)))
    )
    source = _Source(work, started.graph.vocab, text)
    report: dict[str, Any] = {}
    for name in WORKLOADS:
        pairs = _Pairs()
        for index in range(work.rounds + 1):  # the first warms up
            progress(f"{name}, round {index} of {work.rounds}")
            _round(with_, without, source, name, work.seed + index, pairs if index else _Pairs())
        report[name] = _figures(pairs)
    return report | {
        "input_len": work.input_len,
        "output_len": work.output_len,
        "shared": work.shared,
        "requests": work.requests,
        "turns": work.turns,
        "rounds": work.rounds,
        "memory": memory_figures(started.memory),
    }


def _figures(pairs: _Pairs) -> dict[str, Any]:
    return {
        "ttft_ms_with": round(1e3 * median(on for on, _ in pairs.ttft), 4),
        "ttft_ms_without": round(1e3 * median(off for _, off in pairs.ttft), 4),
        "ttft_ratio": round(median(on / off for on, off in pairs.ttft), 4),
        "total_ms_with": round(1e3 * median(on for on, _ in pairs.total), 4),
        "total_ms_without": round(1e3 * median(off for _, off in pairs.total), 4),
        "total_ratio": round(median(on / off for on, off in pairs.total), 4),
        "hit_rate": round(pairs.hit_tokens / pairs.prompt_tokens, 4),
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


def _round(with_: _Side, without: _Side, source: _Source, name: str, seed: int, pairs: _Pairs) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=source.work.output_len, ignore_eos=True)
    so_far: dict[int, list[int]] = {}
    stats = with_.engine.engine.stats
    hits = stats().prefix_hits
    for number, (chat, new, counts) in enumerate(_prompts(source, name, seed)):
        prompt = so_far.setdefault(chat, [])
        prompt += new
        for side in (with_, without) if (number + seed) % 2 else (without, with_):
            side.run(prompt, params)
        assert with_.answer == without.answer, "the prefix cache changed tokens"
        pairs.total.append((with_.seconds, without.seconds))
        if counts:
            pairs.ttft.append((with_.first, without.first))
        pairs.prompt_tokens += len(prompt)
        prompt += with_.answer
    pairs.hit_tokens += stats().prefix_hits - hits
