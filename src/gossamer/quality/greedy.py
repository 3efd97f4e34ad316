"""Greedy continuations straight from an executor, for tasks whose answers are compared as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gossamer.engine.request import SamplingParams
from gossamer.engine.step import Executor, Sampling, Span, StepPlan
from gossamer.errors import CheckpointError

__all__ = ["Prompt", "continue_greedily"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids to continue, by at most max_tokens; ended: whether what was found so far is enough."""

    ids: Sequence[int]
    max_tokens: int
    ended: Callable[[Sequence[int]], bool] = lambda found: False


@dataclass
class _Running:
    index: int
    prompt: Prompt
    pages: list[int]
    found: list[int] = field(default_factory=list)


def continue_greedily(
    executor: Executor,
    prompts: Sequence[Prompt],
    ends: frozenset[int],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to a token of `ends`, which is not among them. As many run
    together as there are pages for; every prompt with its tokens must fit into the pages alone.

    Raises CheckpointError where the model computes NaN.
    """
    limits = executor.limits
    free = list(range(min(limits.pages)))
    out: list[list[int]] = [[] for _ in prompts]
    running: list[_Running] = []
    waiting = list(enumerate(prompts))[::-1]
    done = 0
    while waiting or running:
        while waiting and len(running) < min(limits.max_spans, limits.max_rows, limits.max_tokens):
            index, prompt = waiting[-1]
            need = -(-(len(prompt.ids) + prompt.max_tokens) // limits.page_size)
            if len(free) < need:
                break
            waiting.pop()
            fresh = _Running(index, prompt, [free.pop() for _ in range(need)])
            _fill(executor, fresh)
            running.append(fresh)
        tokens = _step(executor, running)
        for each, token in zip(list(running), tokens, strict=True):
            if token not in ends:
                each.found.append(token)
            if token in ends or len(each.found) == each.prompt.max_tokens or each.prompt.ended(each.found):
                running.remove(each)
                free += each.pages
                out[each.index] = each.found
                done += 1
                advance(done, len(prompts))
    return out


def _fill(executor: Executor, each: _Running) -> None:
    """Computes all of a prompt but its last token, whose step samples."""
    ids, most = each.prompt.ids, executor.limits.max_tokens
    for start in range(0, len(ids) - 1, most):
        part = list(ids[start : min(start + most, len(ids) - 1)])
        tables = (each.pages,) * len(executor.limits.pages)
        executor.collect(executor.submit(StepPlan((Span(each.index, part, start, (), tables),))))


def _step(executor: Executor, running: Sequence[_Running]) -> list[int]:
    """The next token of each."""
    params = SamplingParams(temperature=0)
    spans = []
    for each in running:
        last = (each.found or each.prompt.ids)[-1]
        start = len(each.prompt.ids) + len(each.found) - 1
        sampling = Sampling(params, 0, each.prompt.ids, each.found)
        tables = (each.pages,) * len(executor.limits.pages)
        spans.append(Span(each.index, (last,), start, (0,), tables, sampling))
    rows = executor.collect(executor.submit(StepPlan(tuple(spans)))).rows
    if any(row.bad for (row,) in rows):
        raise CheckpointError("the model computed NaN or infinity; its weights are damaged")
    return [row.token for (row,) in rows]
