"""An executor without a model: holds every plan against the contract, and "samples" a hash of what the
row can see, so that a request's tokens are the same under any schedule that feeds it rightly."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count

from gossamer.engine.request import TokenLogprob
from gossamer.engine.step import (
    ExecutorLimits,
    Handle,
    KVOp,
    LastSampled,
    RowResult,
    Sampling,
    Span,
    StepPlan,
    StepResult,
)

__all__ = ["ContractError", "NullExecutor", "end_after"]

Choose = Callable[[Sampling, int], int | str]

_MASK = 2**64 - 1
_EMPTY = 0x9E3779B97F4A7C15  # hash of no tokens


class ContractError(Exception):
    """A plan that breaks the contract of engine/step.py."""


def end_after(eos: int, tokens: int) -> Choose:
    """For NullExecutor: outputs end with `eos` as their tokens-th token, and nowhere before."""

    def choose(sampling: Sampling, token: int) -> int:
        last = len(sampling.output_ids) == tokens - 1
        return eos if last else token + 1 if token == eos else token

    return choose


class NullExecutor:
    """choose: given a row's sampling and the token drawn, the token to take or, as a string, why it is bad.
    cost: seconds that a plan takes; slept in `collect`.

    Shadow memory holds for every slot of every page a hash of the tokens up to there, as keys and values
    depend on them; what a span would read must be its own sequence's. Raises ContractError from `submit`.
    """

    def __init__(
        self,
        limits: ExecutorLimits,
        *,
        choose: Choose | None = None,
        cost: Callable[[StepPlan], float] | None = None,
    ) -> None:
        self._limits = limits
        self._choose = choose
        self._cost = cost
        self._pages = [[[0] * limits.page_size for _ in range(pages)] for pages in limits.pages]
        self._slower: dict[tuple[int, int], list[int]] = {}
        self._tokens: dict[int, list[int]] = {}  # per sequence, by slot
        self._hashes: dict[int, list[int]] = {}
        self._sampled: dict[int, int] = {}
        self._results: dict[Handle, tuple[StepResult, float]] = {}
        self._handles = count()

    @property
    def limits(self) -> ExecutorLimits:
        """As given."""
        return self._limits

    @property
    def draft_limits(self) -> ExecutorLimits | None:
        """None: it has no draft."""
        return None

    def submit(self, plan: StepPlan) -> Handle:
        """Checks and computes the plan."""
        self._check_plan(plan)
        for op in plan.kv_ops:
            self._move(op)
        for span in plan.spans:  # all writes first: the spans of a step read nothing of each other
            self._write(span)
        rows = [self._sample(span) for span in plan.spans]
        seconds = self._cost(plan) if self._cost else 0.0
        handle = next(self._handles)
        self._results[handle] = StepResult(rows, seconds), seconds
        return handle

    def collect(self, handle: Handle) -> StepResult:
        """The plan's result, after its cost in time. Raises ContractError for a handle not submitted."""
        if handle not in self._results:
            raise ContractError(f"handle {handle} was never submitted, or collected before")
        result, seconds = self._results.pop(handle)
        if seconds > 0:
            time.sleep(seconds)
        return result

    def close(self) -> None:
        """Forgets everything."""
        self._results.clear()
        self._tokens.clear()
        self._hashes.clear()

    # -- the contract -----------------------------------------------------------------------------

    def _check_plan(self, plan: StepPlan) -> None:
        limits = self._limits
        _require(plan.program == "target", f"program {plan.program!r} does not exist")
        _require(bool(plan.spans or plan.kv_ops), "a plan of nothing")
        for name, value, most in (
            ("spans", len(plan.spans), limits.max_spans),
            ("tokens", plan.tokens, limits.max_tokens),
            ("rows", sum(len(span.rows) for span in plan.spans), limits.max_rows),
        ):
            _require(value <= most, f"{value} {name}, at most {most} are allowed")
        sequences = [span.sequence for span in plan.spans]
        _require(len(set(sequences)) == len(sequences), "two spans of one sequence in a step")
        written: dict[tuple[int, int], int] = {}
        for span in plan.spans:
            self._check_span(span)
            first = span.start // limits.page_size
            last = (span.start + len(span.tokens) - 1) // limits.page_size
            for group, table in enumerate(span.tables):
                for page in table[first : last + 1]:
                    owner = written.setdefault((group, page), span.sequence)
                    _require(
                        owner == span.sequence,
                        f"sequences {owner} and {span.sequence} write page {page} of group {group}",
                    )

    def _check_span(self, span: Span) -> None:
        limits, stop = self._limits, span.start + len(span.tokens)
        name = f"span of sequence {span.sequence}"
        _require(len(span.tokens) > 0, f"{name} is empty")
        _require(span.start >= 0 and stop <= limits.max_model_len, f"{name} ends at slot {stop}")
        held = len(self._tokens.get(span.sequence, ()))
        _require(span.start <= held, f"{name} starts at slot {span.start}, {held} are filled")
        for token in span.tokens:
            if isinstance(token, LastSampled):
                _require(token.sequence in self._sampled, f"{name} has {token}, which has none")
            elif not 0 <= token < limits.vocab:
                raise ContractError(f"{name} has token {token} of a vocabulary of {limits.vocab}")
        _require(span.parents is None, f"{name} is a tree")
        rows = list(span.rows)
        _require(rows == sorted(set(rows)), f"{name} has rows {rows} out of order")
        _require(all(0 <= row < len(span.tokens) for row in rows), f"{name} has rows {rows} outside it")
        _require(not rows or span.sampling is not None, f"{name} has rows but no sampling")
        _require(len(span.tables) == len(limits.pages), f"{name} has {len(span.tables)} tables")
        for pages, table in zip(limits.pages, span.tables):
            _require(len(table) * limits.page_size >= stop, f"{name} has {len(table)} pages for {stop} slots")
            if min(table) < 0 or max(table) >= pages or len(set(table)) < len(table):
                raise ContractError(f"{name} has pages {list(table)} of {pages}, or one twice")

    def _move(self, op: KVOp) -> None:
        pages = self._pages[op.group]
        if op.kind == "copy":
            pages[op.target][: op.tokens] = pages[op.source][: op.tokens]
        elif op.kind == "out":
            self._slower[op.group, op.target] = pages[op.source][: op.tokens]
        else:
            pages[op.target][: op.tokens] = self._slower.pop((op.group, op.source))[: op.tokens]

    def _write(self, span: Span) -> None:
        """Puts the span's tokens into shadow memory, after proving that what stands before them is right."""
        size, start = self._limits.page_size, span.start
        tokens = self._tokens.setdefault(span.sequence, [])
        hashes = self._hashes.setdefault(span.sequence, [])
        del tokens[start:], hashes[start:]
        for group, table in enumerate(span.tables):
            for slot in range(0, start, size):
                page = self._pages[group][table[slot // size]]
                if page[: min(size, start - slot)] != hashes[slot : slot + size]:
                    raise ContractError(
                        f"sequence {span.sequence} would read page {table[slot // size]} of group {group}, "
                        f"which is not its own slots {slot} to {min(slot + size, start) - 1}"
                    )
        for token in span.tokens:
            tokens.append(self._sampled[token.sequence] if isinstance(token, LastSampled) else token)
            hashes.append(_mix((hashes[-1] if hashes else _EMPTY) ^ tokens[-1]))
            slot = len(tokens) - 1
            for group, table in enumerate(span.tables):
                self._pages[group][table[slot // size]][slot % size] = hashes[-1]

    def _sample(self, span: Span) -> list[RowResult]:
        sampling = span.sampling
        if sampling is None or not span.rows:
            return []
        history = [*sampling.prompt_ids, *sampling.output_ids]
        seen = self._tokens[span.sequence][: span.start + span.rows[0] + 1]
        if seen != history:
            raise ContractError(f"sequence {span.sequence} sees {seen}, its history is {history}")
        return [self._draw(span.sequence, sampling, span.start + row) for row in span.rows]

    def _draw(self, sequence: int, sampling: Sampling, slot: int) -> RowResult:
        params = sampling.params
        seed = sampling.seed if params.temperature > 0 else 0
        drawn = _mix(self._hashes[sequence][slot] ^ seed) % self._limits.vocab
        token: int | str = self._choose(sampling, drawn) if self._choose else drawn
        if isinstance(token, str):
            return RowResult(-1, bad=token)
        token %= self._limits.vocab
        banned = sampling.banned_ids if len(sampling.output_ids) < params.min_tokens else ()
        if len(set(banned)) >= self._limits.vocab:
            return RowResult(-1, bad="empty")
        while token in banned:
            token = (token + 1) % self._limits.vocab
        self._sampled[sequence] = token
        if params.logprobs is None:
            return RowResult(token)
        top = tuple(((token + i) % self._limits.vocab, -1.0 - i) for i in range(params.logprobs))
        return RowResult(token, TokenLogprob(token, -1.0, top))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


def _mix(x: int) -> int:
    """SplitMix64's finaliser, after one step of its counter."""
    x = (x + _EMPTY) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
