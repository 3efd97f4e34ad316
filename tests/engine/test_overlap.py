"""The next step is planned and submitted while the one before it is in flight, where that can be."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from gossamer.config import ContinuousBatching, PrefixCache, StaticBatching
from gossamer.engine.engine import Engine
from gossamer.engine.pages import IntegrityError
from gossamer.engine.request import Request
from gossamer.engine.step import Executor, LastSampled, StepPlan, StepResult
from gossamer.engine.step_times import StepTimes
from gossamer.runtime.null import ContractError, Delayed, NullExecutor, end_after
from tests.engine.serving import Client, alone, limits, request
from tests.engine.test_exactness import Guess, Steps


class Recorder:
    """Writes down what is submitted and collected, and with which ids."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.limits, self.draft_limits = inner.limits, None
        self.log: list[str] = []
        self.ids: list[list[Any]] = []
        self.handles: list[int] = []

    def submit(self, plan: StepPlan) -> int:
        handle = self.inner.submit(plan)
        self.log.append(f"submit {len(self.handles)}")
        self.ids.append([token for span in plan.spans for token in span.tokens])
        self.handles.append(handle)
        return handle

    def collect(self, handle: int) -> StepResult:
        self.log.append(f"collect {self.handles.index(handle)}")
        return self.inner.collect(handle)

    def close(self) -> None: ...


def serve(
    *requests: Request,
    overlaps: bool = True,
    choose: Any = None,
    batching: Any = None,
    max_num_seqs: int = 8,
    **rest: Any,
) -> tuple[Client, Recorder]:
    null = NullExecutor(limits(**rest), choose=choose)
    recorder = Recorder(Delayed(null) if overlaps else null)
    engine = Engine(
        recorder,
        batching=batching or ContinuousBatching(),
        max_num_seqs=max_num_seqs,
        prefix_cache=PrefixCache(),
    )
    for r in requests:
        engine.submit(r)
    return Client(engine), recorder


def in_turn(log: list[str]) -> bool:
    return log == [f"{what} {i}" for i in range(len(log) // 2) for what in ("submit", "collect")]


def test_a_step_is_submitted_before_the_one_before_it_is_collected() -> None:
    client, recorder = serve(request("a", max_tokens=4), request("b", max_tokens=4))
    got = client.run()
    assert " ".join(recorder.log) == (
        "submit 0 submit 1 collect 0 submit 2 collect 1 submit 3 collect 2 collect 3"
    )
    assert recorder.ids == [[1, 2, 3] * 2] + [[LastSampled(0), LastSampled(1)]] * 3
    for name in "ab":
        assert got[name, 0].tokens == alone(request(name, max_tokens=4))[name, 0].tokens


def test_without_overlap_steps_are_submitted_and_collected_in_turn() -> None:
    client, recorder = serve(request("a", max_tokens=4), request("b", max_tokens=3), overlaps=False)
    client.run()
    assert in_turn(recorder.log) and len(recorder.log) == 8
    assert not any(isinstance(token, LastSampled) for ids in recorder.ids for token in ids)


def test_every_call_brings_the_tokens_of_a_step() -> None:
    client, _ = serve(request("a", range(40), max_tokens=5), max_tokens=16)
    brought = []
    while client.engine.has_work():
        before = len(client.got["a", 0].tokens) if client.got else 0
        client.step()
        brought.append((len(client.got["a", 0].tokens) if client.got else 0) - before)
    assert brought == [0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "wanted",
    [
        {"grammar": partial(Steps, ())},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
    ],
    ids=lambda wanted: next(iter(wanted)),
)
def test_what_goes_by_the_tokens_before_waits_for_them(wanted: Any) -> None:
    client, recorder = serve(request("a", max_tokens=4, **wanted))
    client.engine.submit(request("b", max_tokens=12))
    client.run()
    assert in_turn(recorder.log[:8])
    assert not in_turn(recorder.log)  # b goes on alone


def test_scores_of_a_prompt_are_waited_for_and_no_more_than_they() -> None:
    client, recorder = serve(request("a", range(40), prompt_logprobs=0, max_tokens=3), max_tokens=16)
    got = client.run()
    assert len(got["a", 0].prompt_logprobs) == 39
    assert " ".join(recorder.log[:6]) == "submit 0 collect 0 submit 1 collect 1 submit 2 collect 2"
    assert " ".join(recorder.log[6:]) == "submit 3 submit 4 collect 3 collect 4"


def test_static_batches_and_drafts_go_in_turn() -> None:
    client, recorder = serve(request("a"), request("b", max_tokens=3), batching=StaticBatching())
    client.run()
    assert in_turn(recorder.log)
    client, recorder = serve(request("a"))
    client.engine._speculator = Guess(client.engine, alone(request("a")), 0)
    client.run()
    assert in_turn(recorder.log)


def test_a_row_behind_an_end_is_nobodys_and_the_last_step_is_collected_alone() -> None:
    client, recorder = serve(request("a", eos=(9,)), choose=end_after(9, 2))
    client.step()
    client.step()
    assert client.got["a", 0].reason == "stop" and client.engine.kv_usage == 0
    assert client.engine.has_work() and client.engine.stats().running == 0
    assert client.engine.step() == []
    assert not client.engine.has_work()
    assert recorder.log[-2:] == ["collect 1", "collect 2"]


def test_a_newcomer_joins_while_the_row_of_one_that_ended_is_in_flight() -> None:
    """It finds the answer's beginning in the page that this row writes into, and goes on in pages that the
    other gave back."""
    prompt = list(range(14))
    for tokens in range(1, 20):
        client, _ = serve(request("a", prompt, eos=(9,), max_tokens=30), choose=end_after(9, tokens))
        while not (client.got and client.got["a", 0].reason):
            client.step()
        answer = client.got["a", 0].tokens
        later = [*prompt, *answer, 4, 5]
        client.engine.submit(request("b", later))
        client.step()
        before = client.engine.stats().prefix_hits
        assert before == len(prompt) + tokens - 1
        client.engine.submit(request("c", [8] * 40))
        got = client.run()
        for r in (request("b", later), request("c", [8] * 40)):
            assert got[r.id, 0].tokens == alone(r, choose=end_after(9, tokens))[r.id, 0].tokens


@pytest.mark.parametrize("steps", range(1, 6))
def test_ended_by_the_caller_while_its_row_is_in_flight(steps: int) -> None:
    client, _ = serve(request("a", range(40)), request("b"), request("c"), max_tokens=24)
    for _ in range(steps):
        client.step()
    client.take(client.engine.abort("a"))
    ended = client.engine.finish("b", 0, stop_reason="x")
    assert ended is not None
    client.take([ended])
    client.engine.check()
    client.engine.submit(request("d", range(40)))
    got = client.run()
    for name, prompt in (("c", (1, 2, 3)), ("d", range(40))):
        assert got[name, 0].tokens == alone(request(name, prompt))[name, 0].tokens


def test_who_must_give_way_is_known_first() -> None:
    requests = [request(f"r{i}", [i] * 20, max_tokens=60) for i in range(4)]
    client, recorder = serve(*requests, pages=(9,))
    got = client.run()
    assert client.engine.stats().preemptions > 0 and not in_turn(recorder.log)
    for r in requests:
        assert got[r.id, 0].tokens == alone(r)[r.id, 0].tokens
    state = client.engine._state
    state.ahead = True
    with pytest.raises(IntegrityError, match="give way"):
        state.preempt()
    with pytest.raises(IntegrityError, match="assumed"):
        client.engine.check()


@pytest.mark.parametrize("when", ["submit", "collect"])
def test_a_failure_is_that_of_both_steps_in_flight_and_the_executor_is_free_of_them(when: str) -> None:
    client, recorder = serve(request("old", max_tokens=20), max_num_seqs=2)
    for _ in range(3):
        client.step()
    client.engine.submit(request("new", [1, 2]))  # is in the second of the two alone
    client.engine.submit(request("later"))

    def gone(argument: Any) -> Any:
        setattr(recorder, when, kept)
        if when == "collect":
            kept(argument)
        raise OSError("the device is gone")

    kept = getattr(recorder, when)
    setattr(recorder, when, gone)
    with pytest.raises(OSError, match="gone"):
        client.step()
    client.engine.check()
    assert client.engine.stats().running == 0
    got = client.run()
    assert {name for name, _ in got if got[name, 0].reason == "error"} == {"old", "new"}
    assert got["later", 0].tokens == alone(request("later"))["later", 0].tokens


class Device(NullExecutor):
    """Takes a second a step, on a clock of its own."""

    def __init__(self) -> None:
        super().__init__(limits(overlaps=True))
        self.now = self.done = 0.0
        self.ends: dict[int, float] = {}

    def clock(self) -> float:
        return self.now

    def submit(self, plan: StepPlan) -> int:
        handle = super().submit(plan)
        self.done = self.ends[handle] = max(self.done, self.now) + 1
        return handle

    def collect(self, handle: int) -> StepResult:
        self.now = max(self.now, self.ends[handle])
        return super().collect(handle)


def test_a_step_is_timed_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    engine = Engine(device, batching=ContinuousBatching(), max_num_seqs=2, clock=device.clock)
    seconds: list[float] = []
    monkeypatch.setattr(StepTimes, "observe", lambda *of, **_: seconds.append(of[3]))
    for name in "ab":
        engine.submit(request(name, max_tokens=4))
        while engine.has_work():
            engine.step()
            device.now += 0.25  # the caller's own
    assert seconds == [1.0] * 8


def test_a_delayed_executor_holds_plans_and_order() -> None:
    from tests.runtime.test_null import sampling, span

    executor = Delayed(NullExecutor(limits()))
    table = [0]
    first = executor.submit(StepPlan((span(0, rows=(2,), sampling=sampling([1, 2, 3]), tables=(table,)),)))
    table[0] = 5  # lists are live, and read when the plan is submitted
    later = StepPlan((span(0, (LastSampled(0),), 3, (0,), sampling=sampling([1, 2, 3], pending=1)),))
    second = executor.submit(later)
    with pytest.raises(ContractError, match="more than two"):
        executor.submit(later)
    with pytest.raises(ContractError, match="not the oldest"):
        executor.collect(second)
    assert executor.collect(first).rows[0] and executor.collect(second).rows[0]
