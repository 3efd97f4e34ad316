"""Prompts that begin alike share pages: what is found, what it saves, who may see it, and what goes first."""

from __future__ import annotations

from typing import Any

import pytest

from gossamer.config import ContinuousBatching, PrefixCache
from gossamer.engine.engine import Engine
from tests.engine.serving import Client, make, request

pytestmark = pytest.mark.usefixtures("overlaps")

CACHE = PrefixCache()


def run(engine: Engine, *requests: Any) -> int:
    """Runs requests to their end; how many tokens that computed."""
    before = engine.stats().computed_tokens
    client = Client(engine)
    for r in requests:
        engine.submit(r)
    while engine.has_work():
        client.step()
    return engine.stats().computed_tokens - before


def test_the_same_prompt_again_computes_its_last_token_alone() -> None:
    engine = make(prefix_cache=CACHE)
    prompt = [i % 50 for i in range(40)]
    assert run(engine, request("a", prompt, max_tokens=1)) == 40
    assert run(engine, request("b", prompt, max_tokens=1)) == 1
    stats = engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (80, 39)


@pytest.mark.parametrize("shared", [0, 1, 15, 16, 17, 33, 47, 48])
def test_what_prompts_share_is_computed_once_to_the_token(shared: int) -> None:
    engine = make(prefix_cache=CACHE)
    first, second = [1] * 48, [1] * shared + [2] * (48 - shared)
    run(engine, request("a", first, max_tokens=1))
    assert run(engine, request("b", second, max_tokens=1)) == max(48 - shared, 1)


def test_a_conversation_goes_on_where_it_stopped() -> None:
    engine = make(prefix_cache=CACHE)
    client = Client(engine)
    turn = [3, 1, 4, 1, 5]
    engine.submit(request("a", turn, max_tokens=30))
    while engine.has_work():
        client.step()
    answer = client.got["a", 0].tokens
    # The last token of the answer was sampled and never computed.
    assert run(engine, request("b", [*turn, *answer, 9, 2, 6], max_tokens=1)) == 4


def test_a_running_request_shares_what_it_has() -> None:
    engine = make(prefix_cache=CACHE)
    client = Client(engine)
    prompt = [7] * 33
    engine.submit(request("a", prompt, max_tokens=40))
    for _ in range(4):
        client.step()
    before = engine.stats().computed_tokens
    engine.submit(request("b", [*prompt, 1], max_tokens=1))
    steps = 0
    while ("b", 0) not in client.got:
        client.step()
        steps += 1
    assert engine.stats().computed_tokens - before == steps + 1  # a's next tokens, b's last


def test_another_salt_finds_nothing() -> None:
    engine = make(prefix_cache=CACHE)
    prompt = [5] * 32
    assert run(engine, request("a", prompt, max_tokens=1, cache_salt="mine")) == 32
    assert run(engine, request("b", prompt, max_tokens=1)) == 32
    assert run(engine, request("c", prompt, max_tokens=1, cache_salt="mine")) == 1


def test_without_the_cache_requests_share_nothing_but_outputs_of_one_do() -> None:
    engine = make()
    prompt = [5] * 30
    assert run(engine, request("a", prompt, max_tokens=1)) == 30
    assert run(engine, request("b", prompt, max_tokens=1)) == 30
    assert run(engine, request("c", prompt, max_tokens=1, n=4)) == 30 + 3


def test_outputs_of_one_request_hold_their_prompt_once() -> None:
    engine = make()
    client = Client(engine)
    engine.submit(request("a", [5] * 64, n=4, max_tokens=8, temperature=1.0, seed=1))
    for _ in range(4):
        client.step()
    held = engine._state.kv.pools[0]
    # Three full pages, and of each output the page with the prompt's last token and one to go on in.
    assert held.size - held.available == 3 + 4 * 2


def test_pages_idle_for_longest_go_first_and_held_ones_never() -> None:
    engine = make(prefix_cache=CACHE, pages=(8,), max_model_len=64)
    for i, name in enumerate("abcd"):
        run(engine, request(name, [i] * 31, max_tokens=1))  # two pages each: the pool is full
    run(engine, request("a again", [0] * 31, max_tokens=1))  # so that b's are idle for longest
    run(engine, request("e", [9] * 31, max_tokens=1))
    assert run(engine, request("a once more", [0] * 31, max_tokens=1)) == 1
    assert run(engine, request("b again", [1] * 31, max_tokens=1)) > 1


def test_scores_of_a_prompt_are_computed_whatever_is_known() -> None:
    engine = make(prefix_cache=CACHE)
    prompt = [4] * 40
    run(engine, request("a", prompt, max_tokens=1))
    assert run(engine, request("b", prompt, max_tokens=1, prompt_logprobs=0)) == 40


def test_nothing_is_known_after_a_step_that_failed() -> None:
    engine = make(prefix_cache=CACHE)
    prompt = [4] * 40
    run(engine, request("a", prompt, max_tokens=1))
    engine.submit(request("b", prompt, max_tokens=1))
    submit = engine._executor.submit

    def failing(plan: Any) -> int:
        raise RuntimeError("no")

    engine._executor.submit = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        engine.step()
    engine._executor.submit = submit  # type: ignore[method-assign]
    assert run(engine, request("c", prompt, max_tokens=1)) == 40


def test_pages_below_a_window_go_back_while_a_prompt_is_computed() -> None:
    engine = make(batching=ContinuousBatching(prefill_chunk=16), windows=(32,), max_model_len=128)
    client = Client(engine)
    engine.submit(request("a", [1] * 120, max_tokens=4))
    most = 0
    while engine.has_work():
        client.step()
        pool = engine._state.kv.pools[0]
        most = max(most, pool.size - pool.available)
    assert most == 3  # 32 tokens back and 16 to come
