"""What the engine's tests share: small limits, quick requests, a loop that gathers what came."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from gossamer.config import ContinuousBatching, PrefixCache
from gossamer.engine.batching import Batching
from gossamer.engine.engine import Engine, Update
from gossamer.engine.request import Request, SamplingParams
from gossamer.engine.step import Executor, ExecutorLimits
from gossamer.engine.structured_output import GrammarFactory
from gossamer.runtime.null import Delayed, NullExecutor

VOCAB = 50
OVERLAPS = False  # see the fixture `overlaps`


def limits(**changes: Any) -> ExecutorLimits:
    values: dict[str, Any] = {
        "max_tokens": 32,
        "max_rows": 32,
        "max_spans": 32,
        "page_size": 16,
        "pages": (64,),
        "max_model_len": 128,
        "vocab": VOCAB,
    }
    return ExecutorLimits(**{**values, **changes})


def request(
    id: str,
    prompt: Iterable[int] = (1, 2, 3),
    *,
    priority: int = 0,
    eos: tuple[int, ...] = (),
    tenant: str = "",
    cache_salt: str = "",
    grammar: GrammarFactory | None = None,
    **params: Any,
) -> Request:
    values: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
    return Request(
        id=id,
        prompt_ids=tuple(prompt),
        params=SamplingParams(**{**values, **params}),
        eos_ids=eos,
        priority=priority,
        tenant=tenant,
        cache_salt=cache_salt,
        grammar=grammar,
    )


def executor(bounds: ExecutorLimits, **options: Any) -> Executor:
    made = NullExecutor(bounds, **options)
    return Delayed(made) if OVERLAPS else made


def make(
    *,
    batching: Batching | None = None,
    max_num_seqs: int = 8,
    choose: Any = None,
    prefix_cache: PrefixCache | None = None,
    speculation: Any = None,
    **changes: Any,
) -> Engine:
    return Engine(
        executor(limits(**changes), choose=choose),
        batching=batching or ContinuousBatching(),
        max_num_seqs=max_num_seqs,
        prefix_cache=prefix_cache,
        speculation=speculation,
    )


@dataclass
class Got:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    reason: str | None = None
    stop_reason: str | int | None = None
    times: Any = None
    prompt_logprobs: Any = None


class Client:
    """Gathers updates; nothing may follow a finish."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.got: dict[tuple[str, int], Got] = {}

    def take(self, updates: Iterable[Update]) -> None:
        for update in updates:
            got = self.got.setdefault((update.request_id, update.index), Got())
            assert got.reason is None, f"{update} after the end"
            assert update.tokens or update.finish_reason
            got.tokens += update.tokens
            got.logprobs += update.logprobs or []
            got.prompt_logprobs = got.prompt_logprobs or update.prompt_logprobs
            got.reason, got.stop_reason, got.times = update.finish_reason, update.stop_reason, update.times

    def step(self) -> None:
        self.take(self.engine.step())
        self.engine.check()

    def run(self, *requests: Request, each: Callable[[], None] | None = None) -> dict[tuple[str, int], Got]:
        for r in requests:
            self.engine.submit(r)
        for _ in range(10_000):
            if not self.engine.has_work():
                break
            self.step()
            if each:
                each()
        assert not self.engine.has_work()
        assert self.engine.kv_usage == 0
        return self.got


def alone(r: Request, **changes: Any) -> dict[tuple[str, int], Got]:
    """What the request gives by itself."""
    return Client(make(**changes)).run(r)
