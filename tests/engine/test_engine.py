from __future__ import annotations

from typing import Any

import pytest

from gossamer.config import ContinuousBatching, PrefixCache, StaticBatching
from gossamer.engine.batching import Batching
from gossamer.engine.engine import Engine
from gossamer.engine.step import StepPlan, StepResult
from gossamer.errors import ConfigError, ContextLengthError, MemoryBudgetError, RequestError
from gossamer.runtime.null import end_after
from tests.engine.serving import VOCAB, Client, alone, executor, limits, make, request
from tests.engine.test_exactness import Guess

EVERY = [
    ContinuousBatching(),
    ContinuousBatching(prefill_chunk=3),
    StaticBatching(),
    StaticBatching(padded=True),
]
pytestmark = pytest.mark.usefixtures("overlaps")
every_policy = pytest.mark.parametrize("batching", EVERY, ids=str)


@every_policy
def test_outputs_end_at_max_tokens(batching: Batching) -> None:
    got = Client(make(batching=batching)).run(request("a"), request("b", range(40), max_tokens=3))
    assert (len(got["a", 0].tokens), got["a", 0].reason) == (8, "length")
    assert (len(got["b", 0].tokens), got["b", 0].reason) == (3, "length")


@every_policy
def test_end_and_stop_tokens_end_an_output_and_belong_to_it(batching: Batching) -> None:
    run = Client(make(batching=batching, choose=end_after(9, 4))).run
    got = run(
        request("eos", eos=(9,)),
        request("stop", stop_token_ids=(9,)),
        request("on", eos=(9,), ignore_eos=True),
    )
    assert (got["eos", 0].tokens[3:], got["eos", 0].reason, got["eos", 0].stop_reason) == ([9], "stop", None)
    assert (got["stop", 0].tokens[3:], got["stop", 0].stop_reason) == ([9], 9)
    assert (len(got["on", 0].tokens), got["on", 0].reason) == (8, "length")


def test_min_tokens_bans_every_end() -> None:
    first = alone(request("a"))["a", 0].tokens[0]
    got = alone(request("a", eos=(first,), min_tokens=1, max_tokens=8))["a", 0]
    assert got.tokens[0] != first
    for least, tokens in ((2, 3), (3, 8)):
        got = alone(request("a", eos=(9,), min_tokens=least), choose=end_after(9, 3))["a", 0]
        assert len(got.tokens) == tokens
    everything = tuple(range(VOCAB))
    got = alone(request("a", stop_token_ids=everything, min_tokens=1))["a", 0]
    assert (got.reason, got.stop_reason) == ("error", "empty")


def test_a_missing_or_too_large_max_tokens_is_cut_to_the_context() -> None:
    for most in (None, 10**6):
        got = alone(request("a", max_tokens=most), max_model_len=40)["a", 0]
        assert (len(got.tokens), got.reason) == (37, "length")
    assert len(alone(request("a", max_tokens=None), pages=(2,))["a", 0].tokens) == 29


def test_prompts_that_can_never_run_are_refused_with_the_numbers() -> None:
    with pytest.raises(ContextLengthError, match=r"40 tokens.*\(max_model_len\) 40"):
        make(max_model_len=40).submit(request("a", range(40)))
    with pytest.raises(MemoryBudgetError, match=r"32 tokens.* 3 KV pages of 16 tokens, the pool has 2"):
        make(pages=(9, 2)).submit(request("a", range(32)))
    assert len(alone(request("a", range(31)), pages=(2,))["a", 0].tokens) == 1
    with pytest.raises(RequestError, match="empty"):
        make().submit(request("a", ()))
    engine = make()
    engine.submit(request("a"))
    with pytest.raises(RequestError, match="in use"):
        engine.submit(request("a"))


def test_limits_that_cannot_be_are_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs 9 is not in 1 to 4"):
        make(max_num_seqs=9, max_rows=4)
    with pytest.raises(MemoryBudgetError, match="no page"):
        make(pages=(3, 0))


@every_policy
def test_n_outputs_are_sequences_with_their_own_seeds(batching: Batching) -> None:
    got = Client(make(batching=batching)).run(request("a", n=4, temperature=1.0, seed=3))
    assert len({tuple(g.tokens) for g in got.values()}) == 4
    assert got["a", 0].tokens == alone(request("b", temperature=1.0, seed=3))["b", 0].tokens
    fresh = [alone(request("a", temperature=1.0))["a", 0].tokens for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_logprobs_come_one_per_token_when_asked_for() -> None:
    got = Client(make()).run(request("a", logprobs=2), request("b"))
    assert [lp.token for lp in got["a", 0].logprobs] == got["a", 0].tokens
    assert len(got["a", 0].logprobs[0].top) == 2
    assert got["b", 0].logprobs == []


def test_times_of_a_request_are_in_order() -> None:
    times = alone(request("a", n=2))["a", 1].times
    assert list(times) == ["arrival", "first_scheduled", "first_token", "finished"]
    assert sorted(times.values()) == list(times.values())


@every_policy
@pytest.mark.parametrize("steps", range(6))
def test_abort_in_any_phase_frees_the_pages_at_once(batching: Batching, steps: int) -> None:
    client = Client(make(batching=batching, max_num_seqs=4, max_tokens=4))
    for r in (request("a", range(9), n=2), request("b"), request("queued", n=9)):
        client.engine.submit(r)
    for _ in range(steps):
        client.step()
    for id in ("a", "queued"):
        client.take(client.engine.abort(id))
        client.engine.check()
        assert client.engine.abort(id) == []
    got = client.run()
    assert {got["a", i].reason for i in range(2)} == {got["queued", i].reason for i in range(9)} == {"abort"}
    assert got["b", 0].tokens == alone(request("b"))["b", 0].tokens
    assert client.engine.abort("never seen") == []


@every_policy
def test_the_caller_ends_an_output_at_a_stop_string(batching: Batching) -> None:
    client = Client(make(batching=batching))
    for r in (request("a", n=2), request("b")):
        client.engine.submit(r)
    while ("a", 1) not in client.got:
        client.step()
    update = client.engine.finish("a", 1, stop_reason="\n\n")
    assert update is not None and (update.finish_reason, update.stop_reason) == ("stop", "\n\n")
    client.take([update])
    assert client.engine.finish("a", 1) is None
    got = client.run()
    assert len(got["a", 1].tokens) == 1 and len(got["a", 0].tokens) == len(got["b", 0].tokens) == 8


@every_policy
def test_an_output_may_be_ended_while_it_waits(batching: Batching) -> None:
    client = Client(make(batching=batching))
    client.engine.submit(request("a"))
    update = client.engine.finish("a", 0)
    assert update is not None and update.finish_reason == "stop"
    client.engine.check()
    assert not client.engine.has_work() and client.engine.stats().waiting == 0


@every_policy
def test_a_bad_row_fails_its_output_alone(batching: Batching) -> None:
    def choose(sampling: object, token: int) -> int | str:
        return "nan" if len(sampling.prompt_ids) == 5 and len(sampling.output_ids) == 2 else token  # type: ignore[attr-defined]

    got = Client(make(batching=batching, choose=choose)).run(request("bad", range(5)), request("good"))
    assert (got["bad", 0].reason, got["bad", 0].stop_reason) == ("error", "nan")
    assert len(got["bad", 0].tokens) == 2
    assert got["good", 0].tokens == alone(request("good"))["good", 0].tokens


class Failing:
    """Raises at one call of submit or collect."""

    def __init__(self, when: str, at: int) -> None:
        self.inner = executor(limits(max_tokens=4))
        self.limits, self.draft_limits = self.inner.limits, None
        self.when, self.at = when, at

    def _count(self, where: str) -> None:
        self.at -= where == self.when
        if self.at == 0 and where == self.when:
            raise OSError("the device is gone")

    def submit(self, plan: StepPlan) -> int:
        self._count("submit")
        return self.inner.submit(plan)

    def collect(self, handle: int) -> StepResult:
        result = self.inner.collect(handle)
        self._count("collect")
        return result

    def close(self) -> None: ...


@every_policy
@pytest.mark.parametrize("when", ["submit", "collect"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_failing_step_fails_its_requests_and_no_others(batching: Batching, when: str, at: int) -> None:
    client = Client(Engine(Failing(when, at), batching=batching, max_num_seqs=2))
    for id in "abcd":
        client.engine.submit(request(id))
    with pytest.raises(OSError, match="gone"):
        for _ in range(at):
            client.step()
    client.engine.check()
    assert client.engine.has_work()
    got = client.run()
    failed = {key for key, g in got.items() if g.reason == "error"}
    assert 1 <= len(failed) <= 2 and all(got[key].stop_reason == "executor" for key in failed)
    assert {len(g.tokens) for key, g in got.items() if key not in failed} == {8}


def test_stats_count_what_happened() -> None:
    client = Client(make(max_num_seqs=2))
    for id in "abc":
        client.engine.submit(request(id))
    client.step()
    stats = client.engine.stats()
    assert (stats.running, stats.waiting, stats.steps, stats.prompt_tokens, stats.output_tokens) == (
        2,
        1,
        1,
        6,
        2,
    )
    assert stats.kv_usage == client.engine.kv_usage == pytest.approx(2 / 64)
    assert stats.kv_filled == pytest.approx(3 / 16)
    client.run()
    stats = client.engine.stats()
    assert (stats.running, stats.waiting, stats.output_tokens, stats.preemptions) == (0, 0, 24, 0)
    assert stats.computed_tokens == 3 * (3 + 7)


@pytest.mark.parametrize("wrong", [{"priority": 10**400}, {"priority": 0.5}, {"cache_salt": "\ud800"}])
def test_a_priority_or_salt_that_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        request("wrong", **wrong)


def test_what_cannot_be_submitted_leaves_nothing() -> None:
    def broken() -> Any:
        raise OSError("no grammar")

    client = Client(make(prefix_cache=PrefixCache()))
    with pytest.raises(OSError, match="no grammar"):
        client.engine.submit(request("a", n=3, grammar=broken))
    assert not client.engine.has_work()
    client.engine.check()
    assert len(client.run(request("a"))["a", 0].tokens) == 8


def test_slots_are_counted_once_whoever_shares_them() -> None:
    engine = make(
        windows=(None, 20), pages=(40, 40), prefix_cache=PrefixCache(), max_tokens=16, max_num_seqs=5
    )
    client = Client(engine)
    for i in range(4):
        engine.submit(request(f"{i}", [*range(36), i], n=2, max_tokens=40))
    shared = False
    while engine.has_work():
        client.step()
        slots: dict[tuple[int, int], int] = {}
        held = 0
        for seq in engine._state.running:
            for group, table in enumerate(seq.tables):
                for i, page in enumerate(table):
                    if page >= 0:
                        held += 1
                        slots[group, page] = min(max(seq.computed - 16 * i, 0), 16)
        shared |= held > len(slots)
        assert engine.stats().kv_filled == (sum(slots.values()) / (16 * len(slots)) if slots else 1.0)
    assert shared


def test_a_failing_draft_loses_nobodys_last_update() -> None:
    class Drafts(Guess):
        def draft(self, state: Any) -> None:
            if state.running:
                raise OSError("no draft")

    client = Client(Engine(Failing("collect", 1), batching=ContinuousBatching(), max_num_seqs=2))
    for id in "abc":
        client.engine.submit(request(id, [1, 2, 3, 4]))
    with pytest.raises(OSError, match="gone"):
        client.step()
    state = client.engine._state
    state.start(state.waiting.pop(), 4)
    client.engine._speculator = Drafts(client.engine, {}, 0)
    with pytest.raises(OSError, match="no draft"):
        client.step()
    client.engine._speculator = None
    assert client.run()["a", 0].reason == "error"
