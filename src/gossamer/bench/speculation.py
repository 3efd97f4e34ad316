"""Speculative decoding against plain, one request at a time, greedy, on texts that people wrote.

The model's choice is forced to be a reference continuation: what a step costs is real, and drafts stand
where the reference agrees with them, so that no loop of a small model and no random weights flatter them.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from gossamer.bench.measure import Before, RecordingExecutor, run_step
from gossamer.bench.memory import memory_figures
from gossamer.bench.workload import uncached
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.config import EngineConfig
from gossamer.engine.request import SamplingParams
from gossamer.engine.step import (
    Executor,
    ExecutorLimits,
    Handle,
    Sampling,
    Span,
    StepPlan,
    StepResult,
)
from gossamer.errors import ConfigError
from gossamer.runtime.start import Started
from gossamer.text_engine import TextEngine

__all__ = [
    "Pair",
    "ReplayExecutor",
    "bench_speculation",
    "check_speculation",
    "prompt_pairs",
    "text_pairs",
    "token_pairs",
    "verify_cost",
]

_EDITED = 20  # one word in so many differs in an edited copy
_TURNS = 20  # of a plain step and a verifying one
_LEAST = 16  # tokens of a reference that is worth replaying


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the continuation that the model is made to give."""

    prompt: tuple[int, ...]
    reference: tuple[int, ...]


class ReplayExecutor(Before):
    """Passes steps of one sequence through and gives, for every sampled row whose path is the reference's so
    far, the reference's next token. Rows off its path keep what was sampled: nobody takes them.

    drafts, proposed, accepted: drafts verified, their tokens, and how many of these stood.
    """

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self._forced: dict[Handle, list[dict[int, int]]] = {}
        self.reference: Sequence[int] = ()
        self.drafts = self.proposed = self.accepted = 0

    @property
    def limits(self) -> ExecutorLimits:
        """Those of the executor below, without overlap: that would name its tokens, not the reference's."""
        return replace(self._executor.limits, overlaps=False)

    def submit(self, plan: StepPlan) -> Handle:
        """Passes the step on, with the reference's tokens for its rows noted."""
        forced = [self._next(span) if plan.program == "target" else {} for span in plan.spans]
        handle = self._executor.submit(plan)
        self._forced[handle] = forced
        return handle

    def collect(self, handle: Handle) -> StepResult:
        """The result, its tokens replaced."""
        result = self._executor.collect(handle)
        forced = self._forced.pop(handle)
        rows = [
            [replace(row, token=tokens[i], bad="") if i in tokens else row for i, row in enumerate(span)]
            for span, tokens in zip(result.rows, forced, strict=True)
        ]
        return replace(result, rows=rows)

    def _next(self, span: Span) -> dict[int, int]:
        """Row (its number among the span's) -> the reference's token there."""
        if not span.rows or span.sampling is None:
            return {}
        reference, first = self.reference, span.rows[0]
        done = len(span.sampling.output_ids)
        depths = {first: 0}  # of tokens on the reference's path
        for offset in range(first + 1, len(span.tokens)):
            parent = offset - 1 if span.parents is None else span.parents[offset]
            depth = depths.get(parent)
            if depth is None or done + depth >= len(reference):
                continue
            if span.tokens[offset] == reference[done + depth]:
                depths[offset] = depth + 1
        if len(span.rows) > 1:
            self.drafts += 1
            self.proposed += len(span.rows) - 1
            self.accepted += max(depths.values())
        return {
            i: reference[done + depths[offset]]
            for i, offset in enumerate(span.rows)
            if offset in depths and done + depths[offset] < len(reference)
        }


def check_speculation(config: EngineConfig) -> None:
    """Raises ConfigError for a configuration that does not speculate."""
    if config.speculative_decoding is None:
        raise ConfigError(
            """nothing speculates; say how, such as --speculative-config '{"method": "ngram"}'"""
        )


def text_pairs(
    text: Sequence[int], count: int, input_len: int, output_len: int, seed: int
) -> dict[str, list[Pair]]:
    """Workloads from a text's tokens: "quote" (the answer is a piece of the prompt), "edit" (a piece in
    which here and there a token differs) and "continue" (what follows in the text). Raises ConfigError for a
    text that is too short."""
    needed = input_len + output_len
    if len(text) < needed:
        raise ConfigError(f"the text has {len(text)} tokens, {needed} at least are needed; give more")
    rng = random.Random(seed)
    found: dict[str, list[Pair]] = {"quote": [], "edit": [], "continue": []}
    for _ in range(count):
        start = rng.randrange(len(text) - needed + 1)
        prompt = tuple(text[start : start + input_len])
        at = rng.randrange(max(1, input_len - output_len))
        quoted = prompt[at : at + output_len]
        edited = tuple(rng.choice(text) if rng.randrange(_EDITED) == 0 else token for token in quoted)
        found["quote"].append(Pair(prompt, quoted))
        found["edit"].append(Pair(prompt, edited))
        found["continue"].append(Pair(prompt, tuple(text[start + input_len : start + needed])))
    return found


def token_pairs(vocab: int, count: int, input_len: int, output_len: int, seed: int) -> list[Pair]:
    """Random tokens after random tokens: nothing to guess."""
    rng = random.Random(seed)

    def draw(tokens: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(tokens))

    return [Pair(draw(input_len), draw(output_len)) for _ in range(count)]


def prompt_pairs(
    path: Path, tokenizer: Tokenizer, count: int, input_len: int, output_len: int
) -> dict[str, list[Pair]]:
    """Workloads from JSON lines with "turns" and "reference" (MT-bench, Spec-Bench), by "category": the first
    `count` of each whose prompt and reference (cut to output_len) fit and are no mere words. Raises
    ConfigError for a file that is none or has none."""
    found: dict[str, list[Pair]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the prompts {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the prompts {path} are not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            prompt, answer = entry["turns"][0], entry.get("reference")
            category = str(entry.get("category", path.stem))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ConfigError(f'{path} line {number} is no object with "turns" and "reference"') from None
        answer = answer[0] if isinstance(answer, list) and answer else answer
        if not isinstance(prompt, str) or not isinstance(answer, str):
            continue
        pairs = found.setdefault(category, [])
        if len(pairs) < count:
            ids, reference = (tuple(tokenizer.encode(t, add_special_tokens=False)) for t in (prompt, answer))
            if 0 < len(ids) <= input_len and len(reference) >= _LEAST:
                pairs.append(Pair(ids, reference[:output_len]))
    found = {category: pairs for category, pairs in found.items() if pairs}
    if not found:
        raise ConfigError(
            f"{path} has no prompt of at most {input_len} tokens with a reference of {_LEAST} at least; "
            "raise --input-len"
        )
    return found


@dataclass(slots=True)
class _Run:
    """seconds: of all; decode: from the first token on; steps: decoding ones; tokens: they brought."""

    seconds: float = 0.0
    decode: float = 0.0
    steps: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Side:
    engine: TextEngine
    recorder: RecordingExecutor
    replay: ReplayExecutor


def bench_speculation(
    started: Started,
    workloads: dict[str, list[Pair]],
    rounds: int,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report that `gossamer bench speculation --json` prints. started: with speculation on.

    Each workload has an engine of its own, so that what it learns of one helps no other. speedup: plain
    decoding's seconds over speculation's, prefill left out, the median over rounds.
    """
    vocab = started.graph.vocab
    for name, pairs in workloads.items():
        for pair in pairs:
            if max(*pair.prompt, *pair.reference) >= vocab:
                raise ConfigError(
                    f"{name} has token {max(*pair.prompt, *pair.reference)}, the model's are 0 to "
                    f"{vocab - 1}; choose another --tokenizer"
                )
    config = uncached(started.config)
    assert config.speculative_decoding is not None
    progress("the cost of verification")
    verify = verify_cost(
        started.executor,
        config.speculative_decoding.num_speculative_tokens,
        max(len(pair.prompt) for pairs in workloads.values() for pair in pairs),
    )
    report: dict[str, Any] = {}
    for name, pairs in workloads.items():
        on = _side(replace(started, config=config))
        off = _side(replace(started, config=replace(config, speculative_decoding=None)))
        done: list[tuple[_Run, _Run]] = []
        for index in range(rounds + 1):  # the first warms up
            progress(f"{name}, round {index} of {rounds}")
            first, second = (on, off) if index % 2 else (off, on)
            runs = {id(first): _Run(), id(second): _Run()}
            for pair in pairs:
                for side in (first, second):
                    _replay(side, pair, runs[id(side)])
            if index:
                done.append((runs[id(on)], runs[id(off)]))
            else:
                on.replay.drafts = on.replay.proposed = on.replay.accepted = 0
        report[name] = _figures(done, on.replay, pairs)
    worst = min(report, key=lambda name: report[name]["speedup"])
    return {
        "workloads": report,
        "worst": {"workload": worst, "speedup": report[worst]["speedup"]},
        "verify_cost": verify,
        "rounds": rounds,
        "memory": memory_figures(started.memory),
    }


def verify_cost(executor: Executor, drafted: int, context: int, turns: int = _TURNS) -> dict[str, Any]:
    """What a step that verifies so many drafted tokens after `context` others costs over a plain decode step:
    medians of greedy steps of one sequence, taken in turns. Overwrites KV pages that no engine may hold.
    """
    limits = executor.limits
    drafted = min(drafted, limits.max_rows - 1, limits.max_tokens - 1)
    context = min(context, limits.max_model_len - drafted - 1)
    pages = list(range(-(-(context + drafted + 1) // limits.page_size)))
    prompt = tuple(i % limits.vocab for i in range(context))
    greedy = Sampling(SamplingParams(temperature=0.0), 0, prompt, ())

    def seconds(tokens: Sequence[int], start: int, rows: Sequence[int]) -> float:
        span = Span(0, tuple(tokens), start, rows, (pages,) * len(limits.pages), greedy if rows else None)
        began = time.perf_counter()
        executor.collect(executor.submit(StepPlan((span,))))
        return time.perf_counter() - began

    for start in range(0, context, limits.max_tokens):
        seconds(prompt[start : start + limits.max_tokens], start, ())
    times: list[tuple[float, float]] = []
    for _ in range(turns + 1):  # the first warms up
        one, many = (seconds(prompt[:1] * rows, context, range(rows)) for rows in (1, 1 + drafted))
        times.append((one, many))
    plain, verify = (median(taken) for taken in zip(*times[1:], strict=True))
    return {
        "drafted_tokens": drafted,
        "context": context,
        "plain_ms": round(1e3 * plain, 4),
        "verify_ms": round(1e3 * verify, 4),
        "ratio": round(verify / plain, 4),
    }


def _side(started: Started) -> _Side:
    replay = ReplayExecutor(started.executor)
    recorder = RecordingExecutor(replay)
    return _Side(TextEngine(replace(started, executor=recorder)), recorder, replay)


def _replay(side: _Side, pair: Pair, run: _Run) -> None:
    side.replay.reference = pair.reference
    params = SamplingParams(temperature=0.0, max_tokens=len(pair.reference), ignore_eos=True)
    said: list[int] = []
    began = first = time.perf_counter()
    side.engine.submit(side.engine.new_id(), pair.prompt, params)
    while side.engine.has_work():
        decoding = bool(said)
        _, updates = run_step(side.engine, side.recorder)
        said += (token for update in updates for token in update.tokens)
        if decoding:
            run.steps += 1
        elif said:
            first = time.perf_counter()
    ended = time.perf_counter()
    assert tuple(said) == pair.reference, "the reference was not followed"
    run.seconds += ended - began
    run.decode += ended - first
    run.tokens += len(said) - 1


def _figures(done: list[tuple[_Run, _Run]], replay: ReplayExecutor, pairs: list[Pair]) -> dict[str, Any]:
    on = [run for run, _ in done]
    return {
        "requests": len(pairs),
        "output_tokens": sum(len(pair.reference) for pair in pairs),
        "speedup": round(median(b.decode / a.decode for a, b in done), 4),
        "speedup_with_prefill": round(median(b.seconds / a.seconds for a, b in done), 4),
        "tokens_per_step": round(sum(r.tokens for r in on) / sum(r.steps for r in on), 4),
        "acceptance_length": round(1 + replay.accepted / replay.drafts, 4) if replay.drafts else None,
        "acceptance_rate": round(replay.accepted / replay.proposed, 4) if replay.proposed else None,
        "drafted_steps": round(replay.drafts / sum(r.steps for r in on), 4),
        "plain_tokens_per_s": round(median(b.tokens / b.decode for _, b in done), 2),
        "tokens_per_s": round(median(a.tokens / a.decode for a, _ in done), 2),
    }
