"""Whether the planner chooses well: python -m benchmarks.plan_choice MODEL --results FILE [--seconds S].

Every combination of a grid (weight format x KV type x sequences x tokens of a step) is measured, in rounds,
and each objective's choice among them is held against the best that was measured: its figure over the best
one. Measurements are appended to FILE, one JSON object a line. A run stops after S seconds and the next one
goes on where it was; once all is measured, the table is printed (--json: as an object).

Figures: memory is what the engine allocates; latency a lone request from its arrival to its last token;
production-latency the median time between tokens with --together requests; throughput the output of
--requests requests that come at once; production the same of combinations whose median time between tokens
keeps --itl-limit-ms; easy, among combinations that keep the model, the geometric mean of latency and
throughput.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from gossamer.bench.measure import recording
from gossamer.bench.throughput import run_jobs
from gossamer.bench.workload import make_jobs, random_lengths, uncached
from gossamer.config import EngineConfig
from gossamer.config.engine import KVType
from gossamer.errors import GossamerError
from gossamer.llm import engine_config
from gossamer.planner.efficiencies import current_efficiencies
from gossamer.planner.hardware import Prober, Rates, median_rates
from gossamer.planner.model import open_planned
from gossamer.planner.objectives import OBJECTIVES, Goal, Limits
from gossamer.planner.search import Candidate, Evaluator, best, holds
from gossamer.planner.space import Choice, Space, config_of, space_of
from gossamer.runtime.start import start

__all__ = ["Measured", "main", "verdicts"]

_WEIGHTS = ("as stored", "int8", "int4")
_KV: tuple[KVType, ...] = ("bf16", "int8")
_SEQS = (4, 16)
_TOKENS = (128, 512)
_WHOLE = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Lengths in tokens, requests: of the mix, together: of the run for production-latency."""

    prompt: int
    output: int
    requests: int
    together: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One combination in one round; milliseconds, tokens a second."""

    name: str
    bytes: int
    latency_ms: float
    itl_ms: float
    tokens_per_s: float
    mix_itl_ms: float
    rates: dict[str, Any]


def combinations(space: Space) -> list[Choice]:
    """The grid: choices of a full search that have a usual format."""
    weights = [next(c.weights for c in space.choices if c.weights.name.startswith(w)) for w in _WEIGHTS]
    like = space.choices[0]
    return [
        Choice(
            weights=w,
            kv=kv,
            seqs=seqs,
            tokens=tokens,
            context=like.context,
            kv_tokens=like.context * seqs,
        )
        for w, kv, seqs, tokens in product(weights, _KV, _SEQS, _TOKENS)
    ]


def measure(choice: Choice, config: EngineConfig, work: Work, seed: int) -> Measured:
    """Starts the engine and runs the three workloads."""
    started = start(uncached(config))
    engine, recorder = recording(started)
    rates = Prober(None, started.threads).measure(0.05)

    def run(count: int, spread: float) -> Any:
        lengths = random_lengths(count, work.prompt, work.output, spread, seed)
        return run_jobs(engine, recorder, make_jobs(lengths, [0.0] * count, started.graph.vocab, seed))

    run(1, 0.0)  # threads are awake, pages touched
    alone = [run(1, 0.0) for _ in range(2)]
    together, mix = run(work.together, 0.0), run(work.requests, 0.5)
    return Measured(
        name=choice.name,
        bytes=started.memory.total,
        latency_ms=1e3 * median(o.e2e[0] for o in alone),
        itl_ms=1e3 * median(together.itl),
        tokens_per_s=sum(map(len, mix.tokens)) / mix.seconds,
        mix_itl_ms=1e3 * median(mix.itl),
        rates=asdict(rates),
    )


def figure(objective: str, found: Measured) -> float:
    """Of an objective, less is better."""
    if objective == "memory":
        return float(found.bytes)
    if objective == "latency":
        return found.latency_ms
    if objective == "production-latency":
        return found.itl_ms
    if objective == "easy":
        return math.sqrt(found.latency_ms / found.tokens_per_s)
    return 1.0 / found.tokens_per_s


def middle(found: Sequence[Measured]) -> Measured:
    """Medians over the rounds."""
    first = found[0]
    return Measured(
        name=first.name,
        bytes=first.bytes,
        latency_ms=median(f.latency_ms for f in found),
        itl_ms=median(f.itl_ms for f in found),
        tokens_per_s=median(f.tokens_per_s for f in found),
        mix_itl_ms=median(f.mix_itl_ms for f in found),
        rates={},
    )


def verdicts(
    evaluate: Any, choices: Sequence[Choice], found: Sequence[Measured], work: Work, limit: float | None
) -> list[dict[str, Any]]:
    """Per objective: what the planner chooses among the choices, what was best, and how far apart they are.
    evaluate(goal) -> a Candidate for each choice."""
    by_name: dict[str, list[Measured]] = {}
    for each in found:
        by_name.setdefault(each.name, []).append(each)
    measured = {name: middle(group) for name, group in by_name.items()}
    lines: list[dict[str, Any]] = []
    for objective in OBJECTIVES:
        count = {"latency": 1, "memory": 1, "production-latency": work.together}.get(objective, work.requests)
        limits = Limits(memory=_WHOLE, itl_ms=limit if objective == "production" else None)
        goal = Goal.of(
            objective,
            limits,
            input_len=work.prompt,
            output_len=work.output,
            concurrency=min(count, max(_SEQS)),
        )
        candidates: list[Candidate] = evaluate(goal)
        able = [c for c in candidates if holds(c, goal)]
        allowed = {
            c.name
            for c in choices
            if (objective != "easy" or c.keeps)
            and (objective != "production" or limit is None or measured[c.name].mix_itl_ms <= limit)
        }
        if not able or not allowed:
            lines.append({"objective": objective, "note": "nothing keeps the limit"})
            continue
        chosen = best(able, goal).choice.name
        top = min(allowed, key=lambda name: figure(objective, measured[name]))
        over = figure(objective, measured[chosen]) / figure(objective, measured[top])
        lines.append(
            {
                "objective": objective,
                "chosen": chosen,
                "best": top,
                "over_best": round(over, 4),
                "keeps_limit": chosen in allowed,
            }
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is left, and reports once nothing is."""
    parser = argparse.ArgumentParser(prog="benchmarks.plan_choice", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--together", type=int, default=4)
    parser.add_argument("--itl-limit-ms", type=float)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    work = Work(
        prompt=given.input_len, output=given.output_len, requests=given.requests, together=given.together
    )
    base = engine_config(given.model, load_format=given.load_format)
    model = open_planned(base)
    goal = Goal.of(
        "throughput", Limits(memory=_WHOLE), input_len=2 * given.input_len, output_len=2 * given.output_len
    )
    space = space_of(model, base, goal, full=True)
    choices = combinations(space)
    found = _read(given.results)
    begun = time.perf_counter()
    for round_ in range(given.rounds):
        order = choices if round_ % 2 == 0 else choices[::-1]
        for choice in order:
            if sum(f.name == choice.name for f in found) > round_:
                continue
            if time.perf_counter() - begun > given.seconds:
                left = given.rounds * len(choices) - len(found)
                print(f"{left} of {given.rounds * len(choices)} measurements are left", file=sys.stderr)
                return 0
            one = measure(choice, config_of(base, model.graph, choice), work, seed=round_)
            found.append(one)
            with given.results.open("a") as file:
                file.write(json.dumps(asdict(one)) + "\n")
    rates = median_rates([Rates(**f.rates) for f in found])

    def evaluate(goal: Goal) -> list[Candidate]:
        evaluator = Evaluator(model, goal, rates, current_efficiencies())
        return evaluator.try_choices(replace(space, choices=tuple(choices)))

    lines = verdicts(evaluate, choices, found, work, given.itl_limit_ms)
    if given.json:
        print(json.dumps({"model": given.model, "work": asdict(work), "objectives": lines}, indent=2))
    else:
        _print(given.model, len(choices), given.rounds, lines)
    return 0


def _read(path: Path) -> list[Measured]:
    if not path.is_file():
        return []
    return [Measured(**json.loads(line)) for line in path.read_text().splitlines()]


def _print(model: str, combinations: int, rounds: int, lines: Sequence[dict[str, Any]]) -> None:
    print(f"{model}: {combinations} combinations, {rounds} rounds")
    for line in lines:
        if "note" in line:
            print(f"  {line['objective']:<19} {line['note']}")
            continue
        broken = "" if line["keeps_limit"] else "  (over the limit)"
        print(
            f"  {line['objective']:<19} {line['over_best']:.3f} of the best{broken}: chosen "
            f"{line['chosen']}; best {line['best']}"
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GossamerError as error:
        sys.exit(f"plan_choice: {error}")
