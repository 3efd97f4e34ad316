"""An executor without a model: holds every plan against the contract, and "samples" a hash of what the
row can see, so that a request's tokens are the same under any schedule that feeds it rightly."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count

from gossamer.engine.request import TokenLogprob
from gossamer.engine.step import (
    Executor,
    ExecutorLimits,
    Handle,
    KVOp,
    LastSampled,
    Mask,
    ProgramName,
    RowResult,
    Sampling,
    Span,
    StepPlan,
    StepResult,
)

__all__ = ["ContractError", "Delayed", "NullExecutor", "end_after"]

Choose = Callable[[Sampling, int], int | str]

_MASK = 2**64 - 1
_EMPTY = 0x9E3779B97F4A7C15  # hash of no tokens
_BLANK = (0, 0)


class ContractError(Exception):
    """A plan that breaks the contract of engine/step.py."""


def end_after(eos: int, tokens: int) -> Choose:
    """For NullExecutor: outputs end with `eos` as their tokens-th token, and nowhere before."""

    def choose(sampling: Sampling, token: int) -> int:
        last = len(sampling.output_ids) == tokens - 1
        return eos if last else token + 1 if token == eos else token

    return choose


class _Memory:
    """A program's pages. A slot holds what its keys and values depend on: the hash of all tokens before it,
    and that of those with its own."""

    def __init__(self, limits: ExecutorLimits) -> None:
        self.limits = limits
        self.pages = [[[_BLANK] * limits.page_size for _ in range(pages)] for pages in limits.pages]
        self._slower: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def move(self, op: KVOp) -> None:
        limits = self.limits
        pages, size = self.pages[op.group], limits.page_size
        if op.kind == "copy":
            _require(
                0 <= op.tokens <= size - max(op.source_slot, op.target_slot)
                and (op.source != op.target or op.source_slot > op.target_slot),
                f"{op} is not within a page, or upwards in one",
            )
            taken = pages[op.source][op.source_slot : op.source_slot + op.tokens]
            pages[op.target][op.target_slot : op.target_slot + op.tokens] = taken
            return
        slots = (limits.swap_pages or (0,) * len(limits.pages))[op.group]
        slot = op.target if op.kind == "out" else op.source
        _require(0 <= slot < slots, f"{op} is for slot {slot} of a slower tier of {slots}")
        if op.kind == "out":
            self._slower[op.group, slot] = list(pages[op.source])
        else:
            _require((op.group, slot) in self._slower, f"{op} reads a slot that holds nothing")
            pages[op.target][:] = self._slower.pop((op.group, slot))

    def before(self, span: Span) -> int:
        """The hash of all tokens before a span, after proving that what it would read is one sequence."""
        size, start = self.limits.page_size, span.start
        result = _EMPTY
        for group, (table, window) in enumerate(zip(span.tables, self.limits.windows)):
            seen = 0 if window is None else max(0, start - window + 1)
            state: int | None = _EMPTY if seen == 0 else None
            for slot in range(seen, start):
                before, own = self.pages[group][table[slot // size]][slot % size]
                if state is not None and before != state:
                    raise ContractError(
                        f"sequence {span.sequence} would read page {table[slot // size]} of group {group}, "
                        f"which is not its own at slot {slot}"
                    )
                state = own
            if state is not None:
                result = state
        return result

    def write(self, span: Span, tokens: Sequence[int]) -> list[int]:
        """Puts a span's tokens into its pages; the hash up to each."""
        size, hashes = self.limits.page_size, list[int]()
        start = self.before(span)
        for i, token in enumerate(tokens):
            parent = i - 1 if span.parents is None else span.parents[i]
            before = start if parent < 0 else hashes[parent]
            hashes.append(_mix(before ^ token))
            slot = span.start + i
            for group, table in enumerate(span.tables):
                self.pages[group][table[slot // size]][slot % size] = (before, hashes[-1])
        return hashes


class NullExecutor:
    """choose: given a row's sampling and the token drawn, the token to take or, as a string, why it is bad.
    cost: seconds that a plan takes; slept in `collect`. draft_limits: of a program "draft", which draws what
    the target draws in `draft_agrees` of all cases.

    Shadow memory holds for every slot of every page what keys and values depend on: all tokens up to there.
    What a sampled row reads must be its own sequence's history. Raises ContractError from `submit`.
    """

    def __init__(
        self,
        limits: ExecutorLimits,
        *,
        choose: Choose | None = None,
        cost: Callable[[StepPlan], float] | None = None,
        draft_limits: ExecutorLimits | None = None,
        draft_agrees: float = 0.7,
    ) -> None:
        self._choose = choose
        self._cost = cost
        self._memory: dict[ProgramName, _Memory] = {"target": _Memory(limits)}
        if draft_limits is not None:
            self._memory["draft"] = _Memory(draft_limits)
        self._agrees = draft_agrees
        self._sampled: dict[int, int] = {}
        self._results: dict[Handle, tuple[StepResult, float]] = {}
        self._handles = count()

    @property
    def limits(self) -> ExecutorLimits:
        """As given."""
        return self._memory["target"].limits

    @property
    def draft_limits(self) -> ExecutorLimits | None:
        """As given."""
        return self._memory["draft"].limits if "draft" in self._memory else None

    def submit(self, plan: StepPlan) -> Handle:
        """Checks and computes the plan."""
        _require(plan.program in self._memory, f"program {plan.program!r} does not exist")
        memory = self._memory[plan.program]
        self._check_plan(plan, memory.limits)
        for op in plan.kv_ops:
            memory.move(op)
        # All writes first: the spans of a step read nothing of each other.
        tokens = [self._known(span) for span in plan.spans]
        hashes = [memory.write(span, known) for span, known in zip(plan.spans, tokens)]
        rows = [self._sample(plan.program, *of) for of in zip(plan.spans, tokens, hashes)]
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

    # -- the contract -----------------------------------------------------------------------------

    def _check_plan(self, plan: StepPlan, limits: ExecutorLimits) -> None:
        _require(bool(plan.spans or plan.kv_ops), "a plan of nothing")
        for name, value, most in (
            ("spans", len(plan.spans), limits.max_spans),
            ("tokens", plan.tokens, limits.max_tokens),
            ("rows", sum(len(span.rows) for span in plan.spans), limits.max_rows),
        ):
            _require(value <= most, f"{value} {name}, at most {most} are allowed")
        sequences = [span.sequence for span in plan.spans]
        _require(len(set(sequences)) == len(sequences), "two spans of one sequence in a step")
        users: dict[tuple[int, int], set[int]] = {}
        for span in plan.spans:
            self._check_span(span, limits)
            for group, table in enumerate(span.tables):
                for page in table:
                    users.setdefault((group, page), set()).add(span.sequence)
        for span in plan.spans:
            first = span.start // limits.page_size
            last = (span.start + len(span.tokens) - 1) // limits.page_size
            for group, table in enumerate(span.tables):
                for page in table[first : last + 1]:
                    others = users[group, page] - {span.sequence}
                    _require(
                        not others,
                        f"sequence {span.sequence} writes page {page} of group {group}, that {others} hold",
                    )

    def _check_span(self, span: Span, limits: ExecutorLimits) -> None:
        stop = span.start + len(span.tokens)
        name = f"span of sequence {span.sequence}"
        _require(len(span.tokens) > 0, f"{name} is empty")
        _require(span.start >= 0 and stop <= limits.max_model_len, f"{name} ends at slot {stop}")
        pending = 0
        for token in span.tokens:
            if isinstance(token, LastSampled):
                _require(token.sequence in self._sampled, f"{name} has {token}, which has none")
                pending += 1
            elif not 0 <= token < limits.vocab:
                raise ContractError(f"{name} has token {token} of a vocabulary of {limits.vocab}")
        if span.parents is not None:
            fits = len(span.parents) == len(span.tokens) and span.parents[0] == -1
            fits = fits and all(-1 <= parent < i for i, parent in enumerate(span.parents))
            _require(fits, f"{name} is no tree: {span.parents}")
        rows = list(span.rows)
        _require(rows == sorted(set(rows)), f"{name} has rows {rows} out of order")
        _require(all(0 <= row < len(span.tokens) for row in rows), f"{name} has rows {rows} outside it")
        _require(not rows or span.sampling is not None, f"{name} has rows but no sampling")
        _require(len(span.targets) in (0, len(rows)), f"{name} has {len(span.targets)} targets")
        if span.sampling is not None:
            sampling = span.sampling
            masks = len(sampling.masks)
            _require(not rows or masks in (0, len(rows)), f"{name} has {masks} masks for {len(rows)} rows")
            _require(sampling.pending == pending, f"{name} names {pending} of {sampling.pending} pending")
            plain = not (masks or span.targets or sampling.params.penalises or span.parents)
            _require(not pending or plain, f"{name} needs to know the token that is pending")
        _require(len(span.tables) == len(limits.pages), f"{name} has {len(span.tables)} tables")
        for pages, table, window in zip(limits.pages, span.tables, limits.windows):
            _require(len(table) * limits.page_size >= stop, f"{name} has {len(table)} pages for {stop} slots")
            unseen = 0 if window is None else max(0, span.start - window + 1) // limits.page_size
            needed = list(table[unseen:])
            if needed and (min(needed) < 0 or max(needed) >= pages or len(set(needed)) < len(needed)):
                raise ContractError(f"{name} has pages {list(table)} of {pages}, or one twice")

    # -- sampling ---------------------------------------------------------------------------------

    def _known(self, span: Span) -> list[int]:
        return [self._sampled[t.sequence] if isinstance(t, LastSampled) else t for t in span.tokens]

    def _sample(
        self, program: ProgramName, span: Span, tokens: Sequence[int], hashes: Sequence[int]
    ) -> list[RowResult]:
        sampling = span.sampling
        if sampling is None or not span.rows:
            return []
        parents = range(-1, len(tokens) - 1) if span.parents is None else span.parents
        results = []
        pending = tokens[: sampling.pending]
        history = _hash((*sampling.prompt_ids, *sampling.output_ids, *pending))
        first = next((row for row, target in zip(span.rows, span.targets) if target < 0), span.rows[0])
        for i, row in enumerate(span.rows):
            target = span.targets[i] if span.targets else -1
            if target >= 0:
                seen = _hash(sampling.prompt_ids[: span.start + row + 1])
                _require(hashes[row] == seen, f"row {row} of sequence {span.sequence} sees another prompt")
                wanted = sampling.params.prompt_logprobs or 0
                results.append(RowResult(target, self._logprob(target, wanted)))
                continue
            path: list[int] = []
            at = row
            while at > first:
                path.append(tokens[at])
                at = parents[at]
            path.reverse()
            if at != first or hashes[row] != _hash(path, history):
                raise ContractError(
                    f"row {row} of sequence {span.sequence} does not see its history and {path}"
                )
            seen_by = Sampling(
                sampling.params,
                sampling.seed,
                sampling.prompt_ids,
                [*sampling.output_ids, *pending, *path],
                sampling.banned_ids,
            )
            mask = sampling.masks[i] if sampling.masks else None
            results.append(self._draw(program, span.sequence, seen_by, hashes[row], mask))
        return results

    def _draw(
        self, program: ProgramName, sequence: int, sampling: Sampling, seen: int, mask: Mask | None
    ) -> RowResult:
        params, vocab = sampling.params, self.limits.vocab
        seed = sampling.seed if params.temperature > 0 else 0
        drawn = _mix(seen ^ seed)
        token: int | str = drawn % vocab
        token = self._choose(sampling, drawn % vocab) if self._choose else drawn % vocab
        self._sampled[sequence] = 0  # where the row is bad: any stands in, in a step that nobody will use
        if isinstance(token, str):
            return RowResult(-1, bad=token)
        if program == "draft" and _mix(drawn) % 1000 >= self._agrees * 1000:
            token += 1
        token %= vocab
        banned = sampling.banned_ids if len(sampling.output_ids) < params.min_tokens else ()
        for _ in range(vocab):
            if token not in banned and (mask is None or mask[token // 8] >> token % 8 & 1):
                break
            token = (token + 1) % vocab
        else:
            return RowResult(-1, bad="empty")
        self._sampled[sequence] = token
        return RowResult(token, None if params.logprobs is None else self._logprob(token, params.logprobs))

    def _logprob(self, token: int, most: int) -> TokenLogprob:
        top = tuple(((token + i) % self.limits.vocab, -1.0 - i) for i in range(most))
        return TokenLogprob(token, -1.0, top)


class Delayed:
    """Another executor, as a device would be it: a step is computed when it is collected, with what there was
    when it was submitted. Raises ContractError for more than two in flight, or collected out of order."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._plans: dict[Handle, StepPlan] = {}
        self._handles = count()

    @property
    def limits(self) -> ExecutorLimits:
        """Those of the other, and that it overlaps."""
        return replace(self._executor.limits, overlaps=True)

    @property
    def draft_limits(self) -> ExecutorLimits | None:
        """As the other's."""
        return self._executor.draft_limits

    def submit(self, plan: StepPlan) -> Handle:
        """Notes the plan, and of its live lists what they hold."""
        _require(len(self._plans) < 2, "more than two steps in flight")
        handle = next(self._handles)
        self._plans[handle] = replace(plan, spans=tuple(map(_noted, plan.spans)))
        return handle

    def collect(self, handle: Handle) -> StepResult:
        """Computes the step."""
        _require(handle == next(iter(self._plans), None), f"step {handle} is not the oldest in flight")
        return self._executor.collect(self._executor.submit(self._plans.pop(handle)))

    def close(self) -> None:
        """Closes the other."""
        self._executor.close()


def _noted(span: Span) -> Span:
    tables = tuple(array("i", table) for table in span.tables)
    sampling = span.sampling
    if sampling is not None:
        sampling = replace(sampling, output_ids=tuple(sampling.output_ids), masks=tuple(sampling.masks))
    return replace(span, tokens=tuple(span.tokens), tables=tables, sampling=sampling)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


def _hash(tokens: Iterable[int], state: int = _EMPTY) -> int:
    for token in tokens:
        state = _mix(state ^ token)
    return state


def _mix(x: int) -> int:
    """SplitMix64's finaliser, after one step of its counter."""
    x = (x + _EMPTY) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
