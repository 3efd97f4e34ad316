"""Who goes next: tenants share evenly, priorities age, the rest is first come first served."""

from __future__ import annotations

import pytest

from gossamer.config import ContinuousBatching
from gossamer.engine.engine import Engine
from gossamer.engine.waiting import _REMEMBERED, Turns
from tests.engine.serving import Client, make, request

pytestmark = pytest.mark.usefixtures("overlaps")


def order(engine: Engine) -> list[str]:
    """Requests in the order in which they were let in, one at a time."""
    client, seen = Client(engine), []
    while engine.has_work():
        for seq in engine._state.running:
            if seq.live.request.id not in seen:
                seen.append(seq.live.request.id)
        client.step()
        for seq in engine._state.running:
            if seq.live.request.id not in seen:
                seen.append(seq.live.request.id)
        for name, _ in client.got:
            if name not in seen:
                seen.append(name)
    return seen


def one_at_a_time(ageing: int = 1 << 16) -> Engine:
    return make(batching=ContinuousBatching(ageing=ageing), max_num_seqs=1)


def test_a_tenant_with_one_request_does_not_wait_for_anothers_hundred() -> None:
    engine = one_at_a_time()
    for i in range(20):
        engine.submit(request(f"a{i}", [1] * 20, tenant="a"))
    engine.submit(request("b0", [1] * 20, tenant="b"))
    engine.submit(request("b1", [1] * 20, tenant="b"))
    found = order(engine)
    assert found.index("b0") <= 2 and found.index("b1") <= 4
    assert [name for name in found if name[0] == "a"] == [f"a{i}" for i in range(20)]


def test_shares_are_of_tokens_not_of_requests() -> None:
    engine = one_at_a_time()
    for i in range(8):
        engine.submit(request(f"long{i}", [1] * 90, tenant="long", max_tokens=10))
        engine.submit(request(f"short{i}", [1] * 10, tenant="short", max_tokens=10))
    found = order(engine)
    assert sum(name.startswith("short") for name in found[:9]) >= 6


def test_a_lower_priority_waits_but_not_for_ever() -> None:
    engine = one_at_a_time(ageing=200)
    engine.submit(request("first", [1] * 10))
    engine.submit(request("low", [1] * 10, priority=1))
    for i in range(40):
        engine.submit(request(f"high{i}", [1] * 10))
    found = order(engine)
    assert 3 < found.index("low") < 20


def test_whoever_was_idle_gets_no_credit_for_it() -> None:
    engine = one_at_a_time()
    for i in range(10):
        engine.submit(request(f"a{i}", [1] * 20, tenant="a"))
    client = Client(engine)
    while engine.stats().waiting > 4:
        client.step()
    for i in range(4):
        engine.submit(request(f"b{i}", [1] * 20, tenant="b"))
    found = order(engine)
    turns = [name[0] for name in found if name not in ("a0", "a1", "a2", "a3", "a4", "a5")]
    assert turns[:6] != ["b"] * 4 + ["a"] * 2


def test_a_lower_priority_ages_while_every_request_is_another_tenants() -> None:
    engine = one_at_a_time(ageing=50)
    client = Client(engine)
    engine.submit(request("low", priority=1, tenant="low"))
    for i in range(400):
        while len(engine._state.waiting) < 4:
            engine.submit(request(f"high{i}-{len(engine._state.waiting)}", tenant=f"{i}"))
        client.step()
        if ("low", 0) in client.got and client.got["low", 0].reason:
            break
    else:
        raise AssertionError("it starves")


def test_tenants_that_come_but_once_are_forgotten() -> None:
    for max_tokens in (1, 100):
        turns = Turns(0)
        places = [
            turns.take(request(str(i), tenant=str(i), max_tokens=max_tokens), max_tokens)
            for i in range(20_000)
        ]
        assert len(turns._finish) <= _REMEMBERED and places == sorted(places)
