"""A plan: the choice for a goal, what it would take and do, and all that stands beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from shlex import quote
from typing import Any

from gossamer.backends.cpu.formats import kv_page_bytes
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError, GossamerError
from gossamer.planner.advice import (
    Handbook,
    Part,
    Suggestion,
    handbook,
    offload,
    offload_sentence,
    parts,
    suggestions,
)
from gossamer.planner.efficiencies import Efficiencies, current_efficiencies
from gossamer.planner.hardware import Rates
from gossamer.planner.model import PlannedModel
from gossamer.planner.objectives import Goal
from gossamer.planner.quality import UNKNOWN, SensitivityFile
from gossamer.planner.search import Candidate, Evaluator, best, front, holds, refuse
from gossamer.planner.space import KEEPING_KV, Choice, Space, config_of, flags_of, space_of
from gossamer.planner.units import ms, size

__all__ = ["Plan", "candidate_json", "command", "make_plan", "toml"]

Flags = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """chosen: the choice, its KV pool grown to what there is room for; picked: before it grew, as the others
    are. keeping: the best that keeps the model
    as it is stored, where the choice does not. flags: of the command line, without dashes, the user's own
    among them; tried, able: how many choices there were, and how many hold the limits."""

    model: str
    goal: Goal
    rates: Rates
    efficiencies: Efficiencies
    chosen: Candidate
    picked: Candidate
    keeping: Candidate | None
    front: tuple[Candidate, ...]
    handbook: Handbook
    parts: tuple[Part, ...]
    suggestions: tuple[Suggestion, ...]
    flags: Flags
    reason: str
    notes: tuple[str, ...]
    tried: int
    able: int
    seconds: float


def make_plan(
    model: PlannedModel,
    base: EngineConfig,
    goal: Goal,
    rates: Rates,
    *,
    efficiencies: Efficiencies | None = None,
    given: Collection[str] = (),
    said: Flags = (),
    sensitivity: SensitivityFile | None = None,
    acceptance: Mapping[str, float] | None = None,
    full: bool = False,
    brief: bool = False,
) -> Plan:
    """Searches. base: what the user's flags say; given: which of `space.DECIDED` they decide; said: the flags
    themselves, for the command. efficiencies: None takes this machine's. acceptance: of guesses, by method.
    brief: the choice alone, without what stands beside it.

    Raises ConfigError or MemoryBudgetError where nothing holds the limits (by how much, and the least there
    is), and ConfigError where a limit on quality meets a model of which nothing is known.
    """
    begun = time.perf_counter()
    _check_quality(model, goal, sensitivity)
    if goal.fixed_concurrency and "seqs" in given and base.max_num_seqs < goal.work.concurrency:
        raise ConfigError(
            f"--concurrency {goal.work.concurrency} are to run at once, and --max-num-seqs "
            f"{base.max_num_seqs} runs fewer; leave out one of them, or make them agree"
        )
    efficiencies = current_efficiencies() if efficiencies is None else efficiencies
    evaluator = Evaluator(model, goal, rates, efficiencies, acceptance or {})
    space = space_of(
        model, base, goal, given=given, sensitivity=sensitivity, acceptance=acceptance, full=full
    )
    tried = evaluator.try_choices(space)
    if not tried:
        _impossible(evaluator, space)
    able = [c for c in tried if holds(c, goal)]
    if not able:
        least = min(tried, key=lambda c: c.bytes)
        raise refuse(tried, goal, offload_sentence(offload(least.memory, goal.limits.memory)))
    picked = best(able, goal)
    keeping = [c for c in able if c.choice.keeps]
    chosen = _with_room(evaluator, space, picked)
    notes = []
    if goal.soft_itl_ms is not None and picked.times.itl_ms > goal.soft_itl_ms:
        notes.append(
            f"nothing here holds {goal.soft_itl_ms:g} ms between tokens; this is the quickest. "
            "--itl-limit-ms says another limit"
        )
    return Plan(
        model=model.name,
        goal=goal,
        rates=rates,
        efficiencies=efficiencies,
        picked=picked,
        chosen=chosen,
        keeping=None if picked.choice.keeps or not keeping else best(keeping, goal),
        front=() if brief else tuple(front(able, goal)),
        handbook=handbook(evaluator, space, goal),
        parts=() if brief else tuple(parts(evaluator, space, chosen)),
        suggestions=() if brief else tuple(suggestions(evaluator, space, chosen, goal.limits.memory)),
        flags=(*said, *_new(flags_of(base, model.graph, chosen.choice), said)),
        reason=_reason(picked, able, tried, goal),
        notes=tuple(notes),
        tried=len(tried),
        able=len(able),
        seconds=time.perf_counter() - begun,
    )


def toml(plan: Plan) -> str:
    """The configuration as a file for --config of any verb that loads a model, whose keys are long flags."""
    times, goal = plan.chosen.times, plan.goal
    lines = [
        f"# A plan for {_comment(plan.model)}: {goal.objective}, {goal.work.concurrency} at once of "
        f"{goal.work.prompt_tokens} + {goal.work.output_tokens} tokens.",
        f"# Predicted: {size(plan.chosen.bytes)} in all, {ms(times.ttft_ms)} to the first token, "
        f"{ms(times.itl_ms)} between tokens, {times.tokens_per_s:,.1f} output tokens/s.",
        f"# Why: {plan.reason}.",
        "",
        f"model = {_string(plan.model)}",
    ]
    values: dict[str, list[str]] = {}
    for name, value in plan.flags:
        values.setdefault(name, []).append(value)
    for name, found in values.items():
        if name in _LISTS:
            lines.append(f"{name} = [{', '.join(map(_string, found))}]")
        else:
            number = found[-1] in ("true", "false") or found[-1].isdecimal()
            lines.append(f"{name} = {found[-1] if number else _string(found[-1])}")
    return "\n".join(lines) + "\n"


_LISTS = {"weight-format", "ignore-config-field", "no-fusion-rule"}


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def command(plan: Plan, verb: str = "serve") -> str:
    """The configuration as one types it."""
    words = ["gossamer", verb, plan.model]
    for name, value in plan.flags:
        words += (
            [f"--{name}"]
            if value == "true"
            else [f"--no-{name}"]
            if value == "false"
            else [f"--{name}", value]
        )
    return " ".join(quote(word) for word in words)


def _check_quality(model: PlannedModel, goal: Goal, sensitivity: SensitivityFile | None) -> None:
    known = model.certificate is not None and model.certificate.quality is not None
    if goal.limits.quality is None or known or sensitivity is not None:
        return
    raise ConfigError(
        f"--quality-limit asks for {goal.limits.quality}, and nothing is known of the quality of "
        f"{model.name}: it has no certificate and no sensitivities. "
        f"`gossamer compress {model.name} --recipe int4-gptq --text FILE -o DIR` makes a model with a "
        "certificate: plan for DIR; "
        f"`gossamer eval {model.name} -q int4 --reference fp32 --text FILE` "
        'measures one choice; a recipe of mixed_bits with method = "rtn" measures sensitivities, which '
        "--sensitivity FILE takes; or leave --quality-limit out"
    )


def _impossible(evaluator: Evaluator, space: Space) -> None:
    """Raises what stands against the first choice."""
    if not space.choices:
        raise ConfigError(
            f"a step of {space.base.max_num_batched_tokens} tokens cannot advance every sequence; raise "
            "--max-num-batched-tokens or lower --concurrency"
        )
    choice = space.choices[0]
    config = config_of(space.base, evaluator.model.graph, choice)
    evaluator.candidate(choice, config, UNKNOWN)
    raise ConfigError("no combination of these flags can be; leave some of them to the plan")


def _with_room(evaluator: Evaluator, space: Space, picked: Candidate) -> Candidate:
    """The candidate with what is left of memory, up to an eighth of all, in its KV pool: longer sequences and
    more prefixes to share. An objective of memory takes none, and a pool or context that was given stays."""
    choice, goal = picked.choice, evaluator.goal
    fixed = {"kv_bytes", "context"} & space.given
    if goal.objective == "memory" or "kv_bytes" in fixed or space.base.paged_attention is None:
        return picked
    graph = evaluator.model.graph
    page = space.base.paged_attention.page_size
    unit = kv_page_bytes(graph, page, choice.kv)
    longest = choice.context if "context" in fixed else max(choice.context, graph.max_positions)
    left = goal.limits.memory - picked.bytes + picked.memory.engine.kv
    fits = min(left, max(goal.limits.memory // 8, picked.memory.engine.kv)) // unit * page
    tokens = min(choice.seqs * -(-longest // page) * page, fits)
    if tokens <= choice.kv_tokens:
        return picked
    wider = replace(choice, kv_tokens=tokens, context=min(longest, tokens))
    try:
        grown = evaluator.candidate(wider, config_of(space.base, graph, wider), picked.loss)
    except GossamerError:
        return picked
    return grown if holds(grown, goal) else picked


def _new(flags: Flags, said: Flags) -> Flags:
    names = {name for name, _ in said}
    return tuple(pair for pair in flags if pair[0] not in names)


def _reason(picked: Candidate, able: Sequence[Candidate], tried: Sequence[Candidate], goal: Goal) -> str:
    """Why this one, in a sentence."""
    times, choice = picked.times, picked.choice
    figure = {
        "memory": f"the fewest bytes, {size(picked.bytes)}, of which the process itself is "
        f"{size(picked.memory.process)}",
        "latency": f"the shortest request, {ms(picked.request_ms(goal))}",
        "throughput": f"the most output, {times.tokens_per_s:,.0f} tokens a second",
        "production": f"the most output, {times.tokens_per_s:,.0f} tokens a second,",
        "production-latency": f"the shortest time between tokens, {ms(times.itl_ms)},",
        "easy": ("weights as asked" if choice.weights.given else "the model as it is stored")
        + ", and the engine's usual limits",
    }[goal.objective]
    if goal.objective == "easy" and not _unchanged(choice):
        stored = min((c for c in tried if c.choice.keeps), key=lambda c: c.bytes, default=None)
        why = "" if stored is None else f", which takes {_over(stored, goal)}"
        return (
            f"memory does not hold the model as it is stored{why}; {choice.weights.name} with {choice.kv} KV "
            "changes it least of what fits"
        )
    if goal.objective == "easy":
        return figure
    which = "" if len(able) == len(tried) else f" of the {len(able)} choices that hold the limits"
    if goal.soft_itl_ms is not None and times.itl_ms > goal.soft_itl_ms:
        return f"the shortest time between tokens, {ms(times.itl_ms)}{which}"
    soft = goal.limits.itl_ms or goal.soft_itl_ms
    if goal.objective == "production" and soft is not None and times.itl_ms <= soft:
        figure += f" with at most {soft:g} ms between tokens"
    near = ""
    if goal.objective == "memory":
        near = "; of those within 2 % of the engine's part, the quickest"
    else:
        near = "; of those within 2 % of it, what changes the model least, then the smallest"
    return figure.rstrip(",") + which + near


def _unchanged(choice: Choice) -> bool:
    """Whether nothing but the user's own flags changes the model."""
    return (choice.weights.keeps or choice.weights.given) and choice.kv in KEEPING_KV


def _over(candidate: Candidate, goal: Goal) -> str:
    return f"{size(candidate.bytes)} of the {size(goal.limits.memory)} there are"


def candidate_json(candidate: Candidate | None) -> dict[str, Any] | None:
    """One candidate as plain data."""
    if candidate is None:
        return None
    choice, times, engine = candidate.choice, candidate.times, candidate.memory.engine
    return {
        "weights": choice.weights.name,
        "kv_dtype": choice.kv,
        "max_num_seqs": choice.seqs,
        "max_num_batched_tokens": choice.tokens,
        "max_model_len": candidate.memory.max_model_len,
        "keeps_the_model": choice.keeps,
        "bytes": {
            "weights": engine.weights,
            "kv": engine.kv,
            "arena": engine.arena,
            "workspace": engine.workspace,
            "draft": engine.draft,
            "process": candidate.memory.process,
            "total": candidate.bytes,
        },
        "kv_tokens": engine.kv_tokens,
        "ttft_ms": times.ttft_ms,
        "itl_ms": times.itl_ms,
        "prefill_tokens_per_s": times.prefill_tokens_per_s,
        "decode_tokens_per_s": times.decode_tokens_per_s,
        "tokens_per_s": times.tokens_per_s,
        "decode_step_ms": dict(times.parts),
        "quality": {
            "kl": candidate.loss.kl,
            "perplexity_ratio": candidate.loss.ratio,
            "source": candidate.loss.source,
        },
    }
