"""Trying every choice on paper: bytes and times of each, what holds the limits, the best for an objective."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gossamer.config import EngineConfig
from gossamer.errors import ConfigError, MemoryBudgetError
from gossamer.planner.drafts import speculation_of
from gossamer.planner.efficiencies import Efficiencies
from gossamer.planner.hardware import Rates
from gossamer.planner.memory import MemoryPlan, plan_memory
from gossamer.planner.model import PlannedModel
from gossamer.planner.objectives import Goal
from gossamer.planner.quality import Loss
from gossamer.planner.roofline import Prediction, Speculation, predict
from gossamer.planner.space import Choice, Space, config_of, loss_of
from gossamer.planner.units import ms, size
from gossamer.runtime.planning import passed

__all__ = ["Candidate", "Evaluator", "best", "front", "holds", "refuse", "speed"]

_NEAR = 1.02  # figures this close are as good as equal: no prediction is better than that
_ALIKE = 1.01  # points of a front that one picture would draw as one
_EASY_NEAR = 1.05  # the engine's own limits stay where others promise no more than this
_WHOLE = 1 << 60  # a budget that no plan reaches: bytes are compared here, not there


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A choice with what it would take and do."""

    choice: Choice
    config: EngineConfig
    memory: MemoryPlan
    times: Prediction
    loss: Loss

    @property
    def bytes(self) -> int:
        """Of the whole process, at most."""
        return self.memory.total

    def request_ms(self, goal: Goal) -> float:
        """From a request's arrival to its last token."""
        return self.times.ttft_ms + (goal.work.output_tokens - 1) * self.times.itl_ms


@dataclass(slots=True)
class Evaluator:
    """Bytes and times of configurations of one model on one machine."""

    model: PlannedModel
    goal: Goal
    rates: Rates
    efficiencies: Efficiencies
    acceptance: Mapping[str, float] = field(default_factory=dict)
    _drafts: dict[object, Speculation] = field(default_factory=dict)
    _times: dict[object, Prediction] = field(default_factory=dict)

    def try_choices(self, space: Space) -> list[Candidate]:
        """Every choice that can be. Combinations that cannot are left out."""
        found = []
        for choice in space.choices:
            try:
                config = config_of(space.base, self.model.graph, choice)
                found.append(self.candidate(choice, config, loss_of(self.model, choice, space.stored)))
            except (ConfigError, MemoryBudgetError):
                continue
        return found

    def candidate(self, choice: Choice, config: EngineConfig, loss: Loss) -> Candidate:
        """One choice as a whole. Raises ConfigError where the configuration cannot be."""
        memory = plan_memory(self.model, config, _WHOLE)
        return Candidate(choice=choice, config=config, memory=memory, times=self.times(config), loss=loss)

    def times(self, config: EngineConfig) -> Prediction:
        """What a configuration would do."""
        running = min(config.max_num_seqs, self.goal.work.concurrency)
        key = replace(config, max_num_seqs=running, kv_bytes=None, max_model_len=None, memory_budget=None)
        if key not in self._times:
            graph, _ = passed(self.model.graph, config)
            self._times[key] = predict(
                graph,
                config,
                self.goal.work,
                self.rates,
                self.efficiencies,
                speculation=self._speculation(config),
            )
        return self._times[key]

    def _speculation(self, config: EngineConfig) -> Speculation | None:
        guesses = config.speculative_decoding
        if guesses is None or guesses.method not in self.acceptance:
            return None
        key = (guesses, config.quantization, config.mixed_precision)
        if key not in self._drafts:
            self._drafts[key] = speculation_of(self.model, config, self.acceptance[guesses.method])
        return self._drafts[key]


def holds(candidate: Candidate, goal: Goal) -> bool:
    """Whether it keeps every hard limit."""
    limits, times = goal.limits, candidate.times
    return (
        candidate.bytes <= limits.memory
        and (limits.itl_ms is None or times.itl_ms <= limits.itl_ms)
        and (limits.ttft_ms is None or times.ttft_ms <= limits.ttft_ms)
        and (limits.quality is None or candidate.loss.within(limits.quality))
    )


def best(candidates: Sequence[Candidate], goal: Goal) -> Candidate:
    """The best of candidates that hold the limits (one at least).

    Of those within 2 % of the best figure the one that changes the model least is taken, then the smallest.
    """
    if goal.objective == "easy":
        return _easiest(candidates, goal)
    if goal.soft_itl_ms is not None:
        within = [c for c in candidates if c.times.itl_ms <= goal.soft_itl_ms]
        if not within:
            return min(candidates, key=lambda c: (c.times.itl_ms, c.bytes))
        candidates = within
    if goal.objective == "memory":
        least = min(candidates, key=lambda c: c.bytes)
        room = least.bytes + (_NEAR - 1) * least.memory.engine.total  # the process is what it is
        return min((c for c in candidates if c.bytes <= room), key=lambda c: (c.request_ms(goal), c.bytes))
    score = {id(c): _score(c, goal) for c in candidates}
    top = min(score.values())
    near = [c for c in candidates if score[id(c)] <= top * _NEAR]
    return min(
        near, key=lambda c: (not c.choice.keeps, -c.choice.weights.bits, c.choice.kv == "int4", c.bytes)
    )


def _score(candidate: Candidate, goal: Goal) -> float:
    """The figure of an objective; less is better."""
    times = candidate.times
    if goal.objective in ("throughput", "production"):
        return 1.0 / times.tokens_per_s
    if goal.objective == "production-latency":
        return times.itl_ms
    if goal.objective == "latency":
        return candidate.request_ms(goal)
    return math.sqrt(candidate.request_ms(goal) / times.tokens_per_s)


def _easiest(candidates: Sequence[Candidate], goal: Goal) -> Candidate:
    """What changes the model least, of that the most room for requests, and the engine's own limits unless
    others promise more than 5 %."""

    def change(c: Candidate) -> tuple[bool, float, bool, bool]:
        return (
            not c.choice.weights.keeps,
            -c.choice.weights.bits,
            c.choice.kv not in ("bf16", "f16", "f32"),
            (c.choice.kv == "int4"),
        )

    keeping = [c for c in candidates if c.choice.keeps and not c.choice.weights.dtype] or [
        c for c in candidates if change(c) == min(map(change, candidates))
    ]
    seqs = max(c.choice.seqs for c in keeping)
    roomy = [c for c in keeping if c.choice.seqs == seqs]
    least = min(_score(c, goal) for c in roomy)
    usual = [c for c in roomy if c.choice.tokens == 512 and _score(c, goal) <= least * _EASY_NEAR]
    return min(usual or roomy, key=lambda c: (_score(c, goal), c.bytes))


def front(candidates: Iterable[Candidate], goal: Goal) -> list[Candidate]:
    """Those that no other beats in memory, speed and quality together, fewest bytes first; of those that are
    within 1 % of each other in memory the fastest stands for all. A choice that keeps the model beats one
    that changes it; where quality is unknown on both sides it does not count."""

    def figures(c: Candidate) -> tuple[float, float, float]:
        loss = 0.0 if c.choice.keeps else math.inf if c.loss.kl is None else c.loss.kl
        return float(c.bytes), speed(c, goal), loss

    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=figures):
        taken, slow, loss = figures(candidate)
        if any(s <= slow * _ALIKE and q <= loss for _, s, q in map(figures, kept)):
            continue
        kept = [k for k in kept if not (taken <= k.bytes * _ALIKE and loss <= figures(k)[2])]
        kept.append(candidate)
    return kept


def speed(candidate: Candidate, goal: Goal) -> float:
    """The figure of speed that an objective is about, less is better: a request's milliseconds, or seconds
    for an output token of all requests together."""
    if goal.objective in ("throughput", "production"):
        return 1.0 / candidate.times.tokens_per_s
    return candidate.request_ms(goal)


def refuse(tried: Sequence[Candidate], goal: Goal, advice: str = "") -> ConfigError | MemoryBudgetError:
    """Why nothing holds the limits: by how much they are missed, and the least there is. advice: what else
    there is, as a clause."""
    limits = goal.limits
    at = f"{goal.work.concurrency} requests of {goal.work.prompt_tokens} + {goal.work.output_tokens} tokens"
    at = at if goal.work.concurrency > 1 else at.replace("requests", "request")
    able = [c for c in tried if limits.quality is None or c.loss.within(limits.quality)]
    if not able:
        assert limits.quality is not None
        known = [c for c in tried if c.loss.known]
        least = min(known, key=lambda c: (c.loss.kl or 0.0, c.loss.ratio or 0.0), default=None)
        return ConfigError(
            f"nothing is known to hold {limits.quality}; "
            + ("" if least is None else f"the least known loss is {least.loss} with {least.choice.name}; ")
            + "raise --quality-limit, or measure another choice"
        )
    small = min(able, key=lambda c: c.bytes)
    if small.bytes > limits.memory:
        return MemoryBudgetError(
            f"nothing fits: the least that serves {at} is {size(small.bytes)} ({small.choice.name}: weights "
            f"{size(small.memory.engine.weights)}, KV {size(small.memory.engine.kv)}, the process itself "
            f"{size(small.memory.process)}), {size(small.bytes - limits.memory)} more than the "
            f"{size(limits.memory)} there are{advice}"
        )
    fitting = [c for c in able if c.bytes <= limits.memory]
    reasons = []
    for name, most, flag in (
        ("itl_ms", limits.itl_ms, "--itl-limit-ms"),
        ("ttft_ms", limits.ttft_ms, "--ttft-limit-ms"),
    ):
        quick = min(fitting, key=lambda c: getattr(c.times, name))
        value = getattr(quick.times, name)
        if most is not None and value > most:
            what = "between tokens" if name == "itl_ms" else "to the first token"
            reasons.append(
                f"the least time {what} is {ms(value)} ({quick.choice.name}), {ms(value - most)} above "
                f"{flag} {most:g}"
            )
    if not reasons:
        reasons = ["each limit can be held, and no choice holds all of them together; raise one"]
    return ConfigError(
        f"nothing holds the limits for {at} in {size(limits.memory)}: {'; '.join(reasons)}{advice}"
    )
