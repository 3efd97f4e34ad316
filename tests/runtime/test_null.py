"""The null executor refuses what breaks the contract."""

from __future__ import annotations

from typing import Any

import pytest

from gossamer.engine.request import SamplingParams
from gossamer.engine.step import KVOp, LastSampled, Sampling, Span, StepPlan
from gossamer.runtime.null import ContractError, NullExecutor, end_after
from tests.engine.serving import limits


def sampling(prompt: list[int], output: list[int] | None = None, **changes: Any) -> Sampling:
    return Sampling(SamplingParams(temperature=0), 0, prompt, output or [], **changes)


def span(sequence: int = 0, tokens: Any = (1, 2, 3), start: int = 0, rows: Any = (), **rest: Any) -> Span:
    return Span(sequence, tokens, start, rows, **{"tables": ([sequence],), **rest})


def run(executor: NullExecutor, *spans: Span, **rest: Any) -> list[list[Any]]:
    return executor.collect(executor.submit(StepPlan(spans, **rest))).rows


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ((), "nothing"),
        ((span(tokens=()),), "empty"),
        ((span(tokens=range(40), tables=([0, 1, 2],)),), "40 tokens, at most 32"),
        ((span(i, (1,)) for i in range(33)), "33 spans"),
        ((span(), span()), "two spans"),
        ((span(0), span(1, tables=([0],))), "writes page 0 of group 0, that .1. hold"),
        ((span(start=1),), "not its own at slot 0"),
        ((span(tokens=(1, 50)),), "token 50"),
        ((span(tokens=(LastSampled(0),)),), "has none"),
        ((span(parents=(-1, 2, 0)),), "no tree"),
        ((span(tokens=(1,), parents=(-1, 0)),), "no tree"),
        ((span(rows=(2,)),), "no sampling"),
        ((span(rows=(3,), sampling=sampling([1, 2, 3])),), "outside"),
        ((span(rows=(2, 1), sampling=sampling([1, 2, 3])),), "out of order"),
        ((span(rows=(1,), sampling=sampling([1, 2, 3])),), "its history"),
        ((span(tables=()),), "0 tables"),
        ((span(tables=([],)),), "0 pages"),
        ((span(tables=([64],)),), "pages \\[64\\] of 64"),
        ((span(tokens=range(17), tables=([3, 3],)),), "twice"),
    ],
)
def test_plans_against_the_contract_are_refused(spans: Any, says: str) -> None:
    with pytest.raises(ContractError, match=says):
        run(NullExecutor(limits()), *spans)


def test_reading_what_another_wrote_is_found() -> None:
    executor = NullExecutor(limits())
    run(executor, span(0))
    run(executor, span(1, (1, 2, 4), tables=([0],)))
    with pytest.raises(ContractError, match="does not see its history"):
        run(executor, span(0, (5,), 3, (0,), sampling=sampling([1, 2, 3, 5])))


def test_reading_the_same_tokens_after_other_ones_is_found() -> None:
    executor = NullExecutor(limits())
    run(executor, span(0, range(17), tables=([0, 1],)))
    run(executor, span(1, (*range(1, 17), 16), tables=([2, 1],)))
    with pytest.raises(ContractError, match="page 1"):
        run(executor, span(0, (5,), 17, tables=([0, 1],)))


def test_a_token_depends_on_all_that_is_visible_and_on_nothing_else() -> None:
    a, b = NullExecutor(limits()), NullExecutor(limits())
    whole = run(a, span(rows=(2,), sampling=sampling([1, 2, 3])))
    run(b, span(tokens=(1, 2), tables=([7],)))
    assert run(b, span(tokens=(3,), start=2, rows=(0,), sampling=sampling([1, 2, 3]), tables=([7],))) == whole
    others = {
        run(NullExecutor(limits()), span(tokens=(i, 2, 3), rows=(2,), sampling=sampling([i, 2, 3])))[0][
            0
        ].token
        for i in range(40)
    }
    assert len(others) > 10


def test_the_last_sampled_token_may_be_an_input() -> None:
    a, b = NullExecutor(limits()), NullExecutor(limits())
    for executor in (a, b):
        token = run(executor, span(rows=(2,), sampling=sampling([1, 2, 3])))[0][0].token
    known = run(a, span(0, (token,), 3, (0,), sampling=sampling([1, 2, 3], [token])))
    assert run(b, span(0, (LastSampled(0),), 3, (0,), sampling=sampling([1, 2, 3], pending=1))) == known


def test_kv_moves_take_the_contents_along() -> None:
    executor = NullExecutor(limits(swap_pages=(1,)))
    run(executor, span(0))
    executor.submit(StepPlan((), kv_ops=(KVOp("copy", 0, 0, 5, 3),)))
    run(executor, span(0, (4,), 3, tables=([5],)))
    executor.submit(StepPlan((), kv_ops=(KVOp("out", 0, 5, 0, 4),)))
    run(executor, span(1, (9, 9, 9, 9), tables=([5],)))
    after = span(0, (5,), 4, (0,), sampling=sampling([1, 2, 3, 4, 5]), tables=([6],))
    run(executor, after, kv_ops=(KVOp("in", 0, 0, 6, 16),))
    for op in (KVOp("in", 0, 0, 6, 16), KVOp("out", 0, 6, 1, 16), KVOp("copy", 0, 6, 6, 1, 0, 1)):
        with pytest.raises(ContractError):
            run(executor, after, kv_ops=(op,))


def test_each_row_of_a_tree_sees_its_own_path() -> None:
    executor = NullExecutor(limits())
    rows = run(
        executor,
        span(0, (1, 2, 3, 4), rows=(0, 1, 2, 3), sampling=sampling([1]), parents=(-1, 0, 0, 2)),
    )[0]
    chain = NullExecutor(limits())
    assert [rows[i] for i in (0, 2, 3)] == run(
        chain, span(0, (1, 3, 4), rows=(0, 1, 2), sampling=sampling([1]))
    )[0]
    compacted = (KVOp("copy", 0, 0, 0, 1, 2, 1), KVOp("copy", 0, 0, 0, 1, 3, 2))
    run(executor, span(0, (9,), 3, (0,), sampling=sampling([1], [3, 4, 9])), kv_ops=compacted)


def test_a_draft_program_has_pages_of_its_own_and_agrees_sometimes() -> None:
    executor = NullExecutor(limits(), draft_limits=limits(pages=(2,)), draft_agrees=0.5)
    assert executor.draft_limits is not None
    same = 0
    for i in range(100):
        both = [
            run(executor, span(tokens=(i % 50, 2), rows=(1,), sampling=sampling([i % 50, 2])), program=p)[0][
                0
            ]
            for p in ("target", "draft")
        ]
        same += both[0] == both[1]
    assert 20 < same < 80
    with pytest.raises(ContractError, match="does not exist"):
        run(NullExecutor(limits()), span(), program="draft")


def test_targets_and_masks() -> None:
    executor = NullExecutor(limits())
    scored = sampling([1, 2, 3])
    scored.params = SamplingParams(temperature=0, prompt_logprobs=1)
    rows = run(executor, span(rows=(0, 1, 2), targets=(2, 3, -1), sampling=scored))[0]
    assert [row.token for row in rows[:2]] == [2, 3] and rows[0].logprob is not None
    only = sampling([1, 2, 3], masks=[(1 << 7).to_bytes(8, "little")])
    assert run(executor, span(rows=(2,), sampling=only))[0][0].token == 7
    none = sampling([1, 2, 3], masks=[bytes(8)])
    assert run(executor, span(rows=(2,), sampling=none))[0][0].bad == "empty"


def test_banned_ids_ends_bad_rows_and_handles() -> None:
    executor = NullExecutor(limits(), choose=end_after(9, 1))
    plan = StepPlan((span(rows=(2,), sampling=sampling([1, 2, 3])),))
    handle = executor.submit(plan)
    assert executor.collect(handle).rows[0][0].token == 9
    with pytest.raises(ContractError, match="collected before"):
        executor.collect(handle)
    banned = sampling([1, 2, 3], banned_ids=(9, 10))
    banned.params = SamplingParams(temperature=0, min_tokens=1)
    assert run(executor, span(rows=(2,), sampling=banned))[0][0].token == 11
    bad = NullExecutor(limits(), choose=lambda sampling, token: "nan")
    assert run(bad, *plan.spans)[0][0].bad == "nan"


def test_a_plan_may_cost_time() -> None:
    executor = NullExecutor(limits(), cost=lambda plan: 0.001 * plan.tokens)
    assert executor.collect(executor.submit(StepPlan((span(),)))).seconds == pytest.approx(0.003)
