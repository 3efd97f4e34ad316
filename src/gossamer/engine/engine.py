"""The engine: requests in, steps out to an executor, tokens back.

Single-threaded: whoever shares an engine between threads serialises the calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gossamer.engine.batching import Batching, policy_of
from gossamer.engine.pages import IntegrityError
from gossamer.engine.request import FinishReason, Request, TokenLogprob
from gossamer.engine.sampling import check_ids, end_ids, fresh_seed, sequence_seed
from gossamer.engine.sequence import Live, Sequence
from gossamer.engine.state import State
from gossamer.engine.step import Executor, RowResult, StepPlan, StepResult
from gossamer.errors import ConfigError, ContextLengthError, MemoryBudgetError, RequestError

__all__ = ["Engine", "Stats", "Update"]


@dataclass(slots=True)
class Update:
    """What a step brought one output of a request.

    logprobs: one per token, or None where none were asked for. stop_reason: the stop token or string; for
    "error" what was wrong ("nan", "empty", "executor"). times: the request's, live, in seconds of the
    engine's clock ("arrival", "first_scheduled", "first_token", "finished").
    """

    request_id: str
    index: int
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    times: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Gauges in sequences; kv_usage: part of the pages held, kv_filled: part of the held slots that have
    keys and values (both 0 to 1). Counters since the start: prompt tokens of sequences that got their first
    token, output tokens, tokens computed (with recomputation and padding), steps, preemptions."""

    running: int
    waiting: int
    kv_usage: float
    kv_filled: float
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int
    steps: int
    preemptions: int


class Engine:
    """Serves requests on an executor, batched by a policy.

    max_num_seqs: most sequences running at once. Raises ConfigError where a step of the executor cannot
    hold them, MemoryBudgetError where there are no pages.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        batching: Batching,
        max_num_seqs: int,
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
        self._executor = executor
        self._policy = policy_of(batching)
        self._state = State(limits, max_num_seqs)
        self._context = min(limits.max_model_len, self._state.kv.capacity)
        self._clock = clock
        self._live: dict[str, Live] = {}
        self._undelivered: list[Update] = []
        self._arrivals = self._sequences = 0
        self._prompt_tokens = self._output_tokens = self._computed_tokens = self._steps = 0

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
        live = self._live[request.id] = Live(request, end_ids(request, state.limits.vocab), self._clock())
        for index in range(params.n):
            seq = Sequence(
                id=self._sequences,
                live=live,
                index=index,
                rank=(request.priority, self._arrivals, index),
                limit=limit,
                seed=sequence_seed(seed, index),
                tables=state.kv.new_tables(),
            )
            self._sequences += 1
            live.sequences.append(seq)
            state.enqueue(seq)
        self._arrivals += 1

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
        """Whether a step would bring something."""
        return bool(self._live or self._undelivered)

    # -- steps ------------------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Plans, runs and commits one step: an update for every output that got tokens or ended.

        Raises what the executor raises; the sequences of that step have then failed (their updates come
        with the next call), all others go on.
        """
        updates, self._undelivered = self._undelivered, []
        if not self._live:
            return updates
        self._state.now = self._clock()
        plan = self._policy.plan(self._state)
        if not plan.spans:
            raise IntegrityError("requests wait, but the policy plans nothing")
        try:
            result = self._executor.collect(self._executor.submit(plan))
            if len(result.rows) != len(plan.spans):
                raise IntegrityError(f"{len(plan.spans)} spans were submitted, {len(result.rows)} came back")
        except BaseException:
            self._undelivered = updates + self._fail(plan)
            raise
        updates += self._commit(plan, result)
        return updates

    def _commit(self, plan: StepPlan, result: StepResult) -> list[Update]:
        """Takes a step's tokens in."""
        updates: list[Update] = []
        sequences, now = self._state.sequences, self._clock()
        self._steps += 1
        for span, rows in zip(plan.spans, result.rows):
            stop = span.start + len(span.tokens)
            self._computed_tokens += stop - span.start
            seq = sequences.get(span.sequence)
            if seq is None:  # released since, with the rest of a padded batch
                continue
            if rows and seq.finish_reason is None:
                updates.append(self._append(seq, rows, now))
            elif rows and not rows[0].bad and seq.length < seq.capacity:
                seq.append(rows[0].token)  # a finished row of a padded batch computes on, for nobody
            seq.computed = min(stop, seq.length - 1) if seq.capacity else 0
        return updates

    def _append(self, seq: Sequence, rows: list[RowResult], now: float) -> Update:
        """Appends a sequence's rows up to its end."""
        live = seq.live
        tokens: list[int] = []
        logprobs: list[TokenLogprob] | None = None if live.request.params.logprobs is None else []
        if not seq.output_ids and not rows[0].bad:
            live.times.setdefault("first_token", now)
            self._prompt_tokens += len(seq.prompt_ids)
        update = Update(live.request.id, seq.index, tokens, logprobs, None, None, live.times)
        for row in rows:
            if row.bad:
                self._close(seq, update, "error", row.bad, now)
                break
            seq.append(row.token)
            tokens.append(row.token)
            if logprobs is not None and row.logprob is not None:
                logprobs.append(row.logprob)
            if row.token in live.ends:
                self._close(seq, update, "stop", live.ends[row.token], now)
                break
            if seq.length >= seq.limit:
                self._close(seq, update, "length", None, now)
                break
        self._output_tokens += len(tokens)
        return update

    def _fail(self, plan: StepPlan) -> list[Update]:
        """Ends the sequences of a step that the executor could not do: what their pages hold is unknown."""
        updates: list[Update] = []
        for span in plan.spans:
            seq = self._state.sequences.get(span.sequence)
            if seq is not None and seq.finish_reason is None:
                updates.append(self._end(seq, "error", "executor"))
            elif seq is not None:
                self._state.release(seq)
        return updates

    def _end(self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> Update:
        """Ends a sequence outside the flow of tokens."""
        logprobs: list[TokenLogprob] | None = None if seq.live.request.params.logprobs is None else []
        update = Update(seq.live.request.id, seq.index, [], logprobs, None, None, seq.live.times)
        self._close(seq, update, reason, stop_reason, self._clock())
        return update

    def _close(
        self, seq: Sequence, update: Update, reason: FinishReason, stop_reason: str | int | None, now: float
    ) -> None:
        seq.finish_reason = update.finish_reason = reason
        update.stop_reason = stop_reason
        self._policy.finished(self._state, seq)
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
        held = sum(len(table) for seq in state.running for table in seq.tables) * state.kv.page_size
        filled = sum(seq.computed for seq in state.running) * len(state.kv.pools)
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
        )

    def check(self) -> None:
        """Proves the engine's integrity: every page counted once per holder, none leaked, tables long
        enough, queues in order. Raises IntegrityError; costs time in proportion to pages and sequences."""
        self._state.check()
        unfinished = {s.id for live in self._live.values() for s in live.sequences if s.finish_reason is None}
        kept = {seq.id for seq in self._state.sequences.values() if seq.finish_reason is None}
        if unfinished != kept:
            raise IntegrityError(f"{len(unfinished)} sequences are unfinished, {len(kept)} wait or run")
