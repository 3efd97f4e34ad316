"""The engine: requests in, steps out to an executor, tokens back.

Single-threaded: whoever shares an engine between threads serialises the calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from gossamer.config import ContinuousBatching, PrefixCache
from gossamer.engine.batching import Batching, policy_of
from gossamer.engine.batching.budget import Budget, FixedBudget
from gossamer.engine.pages import IntegrityError
from gossamer.engine.request import FinishReason, Request, TokenLogprob
from gossamer.engine.sampling import check_ids, end_ids, fresh_seed, sequence_seed
from gossamer.engine.sequence import Live, Sequence
from gossamer.engine.speculative_decoding.speculator import Settings, Speculator
from gossamer.engine.speculative_decoding.verify import accepted_path
from gossamer.engine.state import State
from gossamer.engine.step import Executor, Handle, KVOp, RowResult, Span, StepPlan, StepResult
from gossamer.errors import ConfigError, ContextLengthError, MemoryBudgetError, RequestError

__all__ = ["Engine", "Stats", "Update"]

_WINDOW = 1e-3  # seconds that a step sleeps in which newcomers only wait for each other


@dataclass(slots=True)
class Update:
    """What a step brought one output of a request.

    logprobs: one per token, or None where none were asked for. stop_reason: the stop token or string; for
    "error" what was wrong ("nan", "empty", "executor"). times: the request's, live, in seconds of the
    engine's clock ("arrival", "first_scheduled", "first_token", "finished"). cached: tokens of the prompt
    that the prefix cache had. prompt_logprobs: of the prompt's tokens after the first, where asked for, with
    the first tokens of output 0.
    """

    request_id: str
    index: int
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    times: Mapping[str, float]
    cached: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None


@dataclass(slots=True)
class _Flight:
    """A step on its way. moving: sequences whose pages are right once its moves are done. submitted: when, in
    seconds; handle: the executor's, -1 until it has taken the step."""

    plan: StepPlan
    moving: set[int]
    submitted: float
    handle: Handle = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Gauges in sequences; kv_usage: part of the pages held, kv_filled: part of the held slots that have
    keys and values (both 0 to 1). Counters since the start: prompt tokens of sequences that got their first
    token, output tokens, tokens computed (with recomputation, padding and drafts), steps, preemptions and how
    many of those kept their pages on the slower tier; prefix_queries, prefix_hits: tokens of prompts looked
    up in the prefix cache and found; drafted, accepted: tokens of drafts verified, and those that stood.
    goal_unreachable: seconds of a lone decode where even that exceeds the goal for inter-token latency."""

    running: int
    waiting: int
    kv_usage: float
    kv_filled: float
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int
    steps: int
    preemptions: int
    swaps: int
    prefix_queries: int
    prefix_hits: int
    drafted: int
    accepted: int
    goal_unreachable: float | None = None


class Engine:
    """Serves requests on an executor, batched by a policy.

    max_num_seqs: most sequences running at once. prefix_cache: prompts use pages of earlier ones; without it
    only the outputs of one request share their prompt's. budget: how much a step may hold (default: what the
    executor can). Raises ConfigError where a step of the executor cannot hold max_num_seqs sequences or the
    preemption asked for needs a slower tier, MemoryBudgetError where there are no pages.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        batching: Batching,
        max_num_seqs: int,
        prefix_cache: PrefixCache | None = None,
        speculation: Settings | None = None,
        budget: Budget | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        limits = executor.limits
        most = min(limits.max_tokens, limits.max_rows, limits.max_spans)
        if not 1 <= max_num_seqs <= most:
            raise ConfigError(
                f"max_num_seqs {max_num_seqs} is not in 1 to {most}: a step has {limits.max_tokens} tokens, "
                f"{limits.max_rows} sampled rows and {limits.max_spans} spans; lower it or raise those"
            )
        if min(limits.pages) < 1:
            raise MemoryBudgetError("the KV pool has no page; give it more memory (kv_bytes)")
        preempt_by = getattr(batching, "preempt_by", "recompute")
        if preempt_by == "swap" and not limits.swap_pages:
            raise ConfigError(
                "preemption by swap needs a slower tier, and this executor has none; give its size "
                "(--swap-bytes 1GiB), or preempt by recompute"
            )
        self._executor = executor
        self._budget = FixedBudget() if budget is None else budget
        self._policy = policy_of(batching, self._budget)
        self._state = State(
            limits,
            max_num_seqs,
            shares=limits.page_size < limits.max_model_len,
            ageing=getattr(batching, "ageing", 0),
            preempt_by=preempt_by,
        )
        self._caches = prefix_cache is not None
        self._speculator = (
            None if speculation is None else Speculator(speculation, executor, self._state.times)
        )
        self._context = min(limits.max_model_len, self._state.kv.capacity)
        self._overlaps = limits.overlaps and isinstance(batching, ContinuousBatching)
        self._flights: list[_Flight] = []  # between steps at most one; the oldest first
        self._collected = 0.0  # when the newest step was
        self._clock = clock
        self._live: dict[str, Live] = {}
        self._undelivered: list[Update] = []
        self._arrivals = self._sequences = 0
        self._prompt_tokens = self._output_tokens = self._computed_tokens = self._steps = 0
        self._drafted = self._accepted = 0

    # -- requests in and out ------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request; its n outputs wait, run and finish on their own.

        max_tokens beyond the context (or the whole KV pool, if that is smaller) is cut to it.
        Raises RequestError for an empty prompt, a token id outside the vocabulary or an id in use,
        ContextLengthError or MemoryBudgetError for a prompt that could never run.
        """
        state, params, prompt = self._state, request.params, len(request.prompt_ids)
        check_ids(request, state.limits.vocab)
        if request.id in self._live:
            raise RequestError(f"request id {request.id!r} is in use; choose another")
        if prompt >= state.limits.max_model_len:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens, the context (max_model_len) {state.limits.max_model_len}, "
                "and one at least must be left for the output; shorten the prompt or raise max_model_len"
            )
        if prompt >= self._context:
            raise MemoryBudgetError(
                f"the prompt's {prompt} tokens and one of output need {state.kv.pages(prompt + 1)} KV pages "
                f"of {state.kv.page_size} tokens, the pool has {min(state.limits.pages)}; shorten the prompt "
                "or give the pool more memory (kv_bytes)"
            )
        limit = self._context if params.max_tokens is None else min(self._context, prompt + params.max_tokens)
        seed = fresh_seed() if params.seed is None else params.seed
        live = Live(request, end_ids(request, state.limits.vocab), self._clock())
        place = state.turns.take(request, limit - prompt)
        salt = self._salt(request)
        for index in range(params.n):
            seq = Sequence(
                id=self._sequences,
                live=live,
                index=index,
                rank=(place, self._arrivals, index),
                limit=limit,
                seed=sequence_seed(seed, index),
                tables=state.kv.new_tables(),
                prefixes=None if salt is None else state.prefixes(salt),
            )
            self._sequences += 1
            live.sequences.append(seq)
        # All that may fail is done: what is refused leaves nothing here.
        self._live[request.id] = live
        for seq in live.sequences:
            state.enqueue(seq)
        self._arrivals += 1

    def _salt(self, request: Request) -> str | None:
        """Who may share a request's pages: those of the same salt; None: nobody."""
        if not self._state.shares:
            return None
        if self._caches:
            return request.cache_salt
        return None if request.params.n == 1 else str(self._arrivals)

    def abort(self, request_id: str) -> list[Update]:
        """Ends a request in any phase; its pages are free on return. The last updates of its unfinished
        outputs (reason "abort"), none for an id that is not here (any more)."""
        live = self._live.get(request_id)
        if live is None:
            return []
        return [self._end(seq, "abort") for seq in live.sequences if seq.finish_reason is None]

    def finish(self, request_id: str, index: int, *, stop_reason: str | int | None = None) -> Update | None:
        """Ends one output with reason "stop", for what only the caller can see, such as a stop string.
        No more tokens of it will come. Its last update; None where it had finished already."""
        live = self._live.get(request_id)
        if live is None or live.sequences[index].finish_reason is not None:
            return None
        return self._end(live.sequences[index], "stop", stop_reason)

    def has_work(self) -> bool:
        """Whether a step would bring something, or one is in flight."""
        return bool(self._live or self._undelivered or self._flights)

    # -- steps ------------------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Plans, runs and commits one step: an update for every output that got tokens or ended. Where the
        executor overlaps steps, the one after it is planned and submitted before it is waited for.

        Raises what the executor raises; the sequences of the steps in flight have then failed (their updates
        come with the next call), all others go on.
        """
        flights, flight = self._flights, None
        try:
            if flights or (self._live and self._launch()):
                if self._overlaps and self._live:
                    self._launch_ahead()
                flight = flights.pop(0)
                result, count = self._executor.collect(flight.handle), len(flight.plan.spans)
                if len(result.rows) != count:
                    raise IntegrityError(f"{count} spans were submitted, {len(result.rows)} came back")
        except BaseException:
            self._fail(flight)
            raise
        updates, self._undelivered = self._undelivered, []
        if flight is not None:
            now = self._clock()
            since = flight.submitted if flight.submitted > self._collected else self._collected
            self._collected = now
            self._learn(flight.plan, result, now - since)
            updates += self._commit(flight.plan, result, now)
        return updates

    def _launch(self) -> bool:
        """Plans and submits a step; False, after a while, where there is none for now."""
        state = self._state
        state.now = self._clock()
        if self._speculator is not None:
            self._speculator.draft(state)
        plan = self._policy.plan(state)
        while state.gave_way:
            seq = state.gave_way.pop()
            if self._speculator is not None:
                self._speculator.forget(seq)
        if not plan.spans:
            if not self._flights:
                self._wait()
            return False
        moving: set[int] = set()
        if state.kv_ops:
            plan = replace(plan, kv_ops=tuple(state.kv_ops))
            moving, state.moving = state.moving, set()
            state.kv_ops.clear()
        flight = _Flight(plan, moving, self._clock())
        self._flights.append(flight)
        flight.handle = self._executor.submit(plan)
        return True

    def _wait(self) -> None:
        if self._state.running or self._budget.admits(self._state):
            raise IntegrityError("requests wait, but the policy plans nothing")
        time.sleep(_WINDOW)

    def _launch_ahead(self) -> None:
        """Submits the step after the one in flight, unless it needs to know what that one brings: drafts,
        grammars, penalties and scores do, and so does whoever must give way.

        A sequence that turns out to have ended has a row in it all the same, which nobody takes. That writes
        behind what was known of the sequence, hence behind all that its pages are published with, and never
        into shared pages; whoever gets these pages writes in a later step, which the executor does later.
        """
        state = self._state
        if self._speculator is not None:
            return
        assumed: list[tuple[Sequence, Span]] = []
        for span in self._flights[0].plan.spans:
            seq = state.sequences.get(span.sequence)  # None: it was ended since
            if seq is not None:
                if span.rows and (seq.by_history or span.targets):
                    return
                assumed.append((seq, span))
        for seq, span in assumed:
            seq.assume(span)
        state.ahead = True
        try:
            if state.can_grow:
                self._launch()
        finally:
            state.ahead = False
            for seq, span in assumed:
                seq.retract(span)

    def _learn(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """What the step cost, for those who plan by it."""
        tokens = kv_tokens = pairs = rows = 0
        for span in plan.spans:
            count, start = len(span.tokens), span.start
            tokens += count
            kv_tokens += start + count
            pairs += start + 1 if count == 1 else count * start + count * (count + 1) // 2
            rows += len(span.rows)
        times = self._state.times
        if plan.kv_ops:
            moved = sum(op.kind != "copy" for op in plan.kv_ops)
            times.observe_swap(moved, result.move_seconds)
            seconds -= result.move_seconds
        times.observe(tokens, kv_tokens, seconds, rows=rows, pairs=pairs)
        self._computed_tokens += tokens

    def _commit(self, plan: StepPlan, result: StepResult, now: float) -> list[Update]:
        """Takes a step's tokens in."""
        updates: list[Update] = []
        state = self._state
        sequences, windowed = state.sequences, state.kv.windowed
        self._steps += 1
        for span, rows in zip(plan.spans, result.rows):
            stop = span.start + len(span.tokens)
            seq = sequences.get(span.sequence)
            if seq is None:  # released since: it had ended, or did with the rest of a padded batch
                continue
            # What it had before this step's rows: whoever ends now leaves that to the prefix cache.
            seq.computed = min(stop, seq.length)
            if seq.computed >= seq.next_block:
                state.publish(seq)
            if rows and seq.finish_reason is None:
                update = self._take(seq, span, rows, now)
                if update is not None:
                    updates.append(update)
            elif rows and not rows[0].bad and seq.length < seq.capacity:
                seq.append(rows[0].token)  # a finished row of a padded batch computes on, for nobody
            if not seq.capacity:
                continue
            computed = min(stop, seq.length - 1)
            seq.computed = computed
            if computed >= seq.next_block:
                state.publish(seq)
            if windowed:
                state.kv.trim(seq.tables, computed)
        return updates

    def _take(self, seq: Sequence, span: Span, rows: list[RowResult], now: float) -> Update | None:
        """What a span's rows mean for its sequence; None where they were the prompt's scores alone."""
        if span.targets:
            rows = self._score(seq, span, rows)
            if not rows:
                return None
        draft = seq.draft
        if draft is None:
            return self._append(seq, rows, now)
        seq.draft = None
        path = accepted_path(draft, rows)
        drafted, accepted = len(draft.tokens), len(path) - 1
        self._drafted += drafted
        self._accepted += accepted
        if self._speculator is not None:
            self._speculator.verified(seq, drafted, accepted, [rows[offset].token for offset in path])
        update = self._append(seq, [rows[offset] for offset in path], now)
        if draft.parents is not None and seq.finish_reason is None:
            self._compact(seq, span.start, path)
        return update

    def _score(self, seq: Sequence, span: Span, rows: list[RowResult]) -> list[RowResult]:
        """Takes the log-probabilities of a prompt's tokens; the rows that are left sample."""
        scores = seq.live.scores
        assert scores is not None
        for row, target in zip(rows, span.targets):
            if target < 0 or row.bad:
                break
            assert row.logprob is not None
            scores.append(row.logprob)
        else:
            return []
        return rows[-1:] if target < 0 else [row]

    def _compact(self, seq: Sequence, start: int, path: list[int]) -> None:
        """Brings keys and values of a tree's path together; `path` names slots from `start` on."""
        size = self._state.kv.page_size
        for index, offset in enumerate(path):
            if offset != index:
                source, target = start + offset, start + index
                for group, table in enumerate(seq.tables):
                    op = KVOp(
                        "copy",
                        group,
                        table[source // size],
                        table[target // size],
                        1,
                        source % size,
                        target % size,
                    )
                    self._state.kv_ops.append(op)
                self._state.moving.add(seq.id)

    def _append(self, seq: Sequence, rows: list[RowResult], now: float) -> Update:
        """Appends a sequence's rows up to its end."""
        live = seq.live
        tokens: list[int] = []
        logprobs: list[TokenLogprob] | None = None if live.request.params.logprobs is None else []
        update = Update(live.request.id, seq.index, tokens, logprobs, None, None, live.times, live.cached)
        if not seq.output_ids and not rows[0].bad:
            live.times.setdefault("first_token", now)
            self._prompt_tokens += len(seq.prompt_ids)
            if seq.index == 0:
                # Handed over, not kept: twenty a token weigh more than the token's keys and values may.
                update.prompt_logprobs, live.scores = live.scores, None
        grammar = seq.grammar
        for row in rows:
            if row.bad:
                why = row.bad if grammar is None or not grammar.error else grammar.error
                self._close(seq, update, "error", why, now)
                break
            token = row.token
            seq.append(token)
            tokens.append(token)
            if logprobs is not None and row.logprob is not None:
                logprobs.append(row.logprob)
            if token in live.ends:
                self._close(seq, update, "stop", live.ends[token], now)
                break
            if grammar is not None:
                grammar.accept(token)
                if grammar.ended:  # before the limit: an output that is complete was not cut
                    self._close(seq, update, "stop", None, now)
                    break
            if seq.length >= seq.limit:
                self._close(seq, update, "length", None, now)
                break
        self._output_tokens += len(tokens)
        return update

    def _fail(self, collecting: _Flight | None) -> None:
        """Ends the sequences of all steps in flight, of which the executor could not do one: what their pages
        hold is unknown. collecting: the one that was being collected."""
        others, self._flights = self._flights, []
        failed = others if collecting is None else [collecting, *others]
        for name in {s.sequence: None for f in failed for s in f.plan.spans} | {
            name: None for f in failed for name in f.moving
        }:
            seq = self._state.sequences.get(name)
            if seq is not None:
                seq.prefixes = None
            if seq is not None and seq.finish_reason is None:
                self._undelivered.append(self._end(seq, "error", "executor"))
            elif seq is not None:
                self._state.release(seq)
        if failed and self._state.prefix is not None:
            self._state.prefix.clear()
        for flight in others:
            if flight.handle >= 0:  # so that the executor is free of it; what it says now adds nothing
                with suppress(Exception):
                    self._executor.collect(flight.handle)

    def _end(self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> Update:
        """Ends a sequence outside the flow of tokens."""
        logprobs: list[TokenLogprob] | None = None if seq.live.request.params.logprobs is None else []
        live = seq.live
        update = Update(live.request.id, seq.index, [], logprobs, None, None, live.times, live.cached)
        self._close(seq, update, reason, stop_reason, self._clock())
        return update

    def _close(
        self, seq: Sequence, update: Update, reason: FinishReason, stop_reason: str | int | None, now: float
    ) -> None:
        seq.finish_reason = update.finish_reason = reason
        update.stop_reason = stop_reason
        if self._speculator is not None:
            self._speculator.forget(seq)
        self._policy.finished(self._state, seq)
        self._state.turns.ended(seq.live.request, seq.rank[0], len(seq.output_ids))
        live = seq.live
        live.unfinished -= 1
        if not live.unfinished:
            live.times["finished"] = now
            del self._live[live.request.id]

    # -- insight ----------------------------------------------------------------------------------

    @property
    def kv_usage(self) -> float:
        """Part of the KV pages that is held, 0 to 1."""
        return self._state.kv.usage

    def stats(self) -> Stats:
        """Gauges and counters of this moment."""
        state = self._state
        held, filled = self._slots()
        return Stats(
            running=len(state.running),
            waiting=len(state.waiting),
            kv_usage=state.kv.usage,
            kv_filled=filled / held if held else 1.0,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            computed_tokens=self._computed_tokens,
            steps=self._steps,
            preemptions=state.preemptions,
            swaps=state.swaps,
            prefix_queries=0 if state.prefix is None else state.prefix.queries,
            prefix_hits=0 if state.prefix is None else state.prefix.hits,
            drafted=self._drafted,
            accepted=self._accepted,
            goal_unreachable=self._budget.unreachable,
        )

    def _slots(self) -> tuple[int, int]:
        """Slots in the pages that running sequences hold, each page once, and those with keys and values.
        Cheap: whatever a page's holders, its empty slots are one sequence's alone (see State.check)."""
        state = self._state
        size = state.kv.page_size
        held = sum(pool.size - pool.available for pool in state.kv.pools) * size
        empty = sum(len(table) * size - seq.computed for seq in state.running for table in seq.tables)
        return held, held - empty

    def check(self) -> None:
        """Proves the engine's integrity: every page counted once per holder, none leaked, tables long
        enough, queues in order. Raises IntegrityError; costs time in proportion to pages and sequences."""
        self._state.check([flight.plan for flight in self._flights])
        if self._speculator is not None:
            self._speculator.check()
        unfinished = {s.id for live in self._live.values() for s in live.sequences if s.finish_reason is None}
        kept = {seq.id for seq in self._state.sequences.values() if seq.finish_reason is None}
        if unfinished != kept:
            raise IntegrityError(f"{len(unfinished)} sequences are unfinished, {len(kept)} wait or run")
