"""The reference is followed on every path that agrees with it, and nowhere else."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.bench.speculation import (
    Pair,
    ReplayExecutor,
    bench_speculation,
    check_speculation,
    prompt_pairs,
    text_pairs,
    token_pairs,
    verify_cost,
)
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.config import EngineConfig, SpeculativeDecoding
from gossamer.engine.request import SamplingParams
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.step import Handle, RowResult, Sampling, Span, StepPlan, StepResult
from gossamer.errors import ConfigError
from gossamer.runtime.start import start
from tests.engine.serving import limits

OTHER = 7  # what the executor below samples, everywhere


class Fixed:
    """Samples the same token in every row."""

    limits = limits()
    draft_limits = None

    def submit(self, plan: StepPlan) -> Handle:
        self.plan = plan
        return 0

    def collect(self, handle: Handle) -> StepResult:
        return StepResult([[RowResult(OTHER) for _ in span.rows] for span in self.plan.spans])

    def close(self) -> None: ...


def replayed(
    reference: list[int], done: int, draft: list[int], parents: list[int] | None = None
) -> tuple[list[int], ReplayExecutor]:
    """Tokens of the rows of a decode with a draft, `done` of the reference being produced."""
    executor = ReplayExecutor(Fixed())
    executor.reference = reference
    sampling = Sampling(SamplingParams(), 0, (1,), reference[:done])
    span = Span(
        0,
        (reference[done - 1], *draft),
        done,
        range(len(draft) + 1),
        (array("i", [0]),),
        sampling,
        parents=None if parents is None else (-1, *(p + 1 for p in parents)),
    )
    result = executor.collect(executor.submit(StepPlan((span,))))
    return [row.token for row in result.rows[0]], executor


def test_chains() -> None:
    reference = [10, 11, 12, 13, 14]
    assert replayed(reference, 1, [])[0] == [11]
    tokens, executor = replayed(reference, 1, [11, 12, 9, 14])
    assert tokens == [11, 12, 13, OTHER, OTHER]
    assert (executor.drafts, executor.proposed, executor.accepted) == (1, 4, 2)
    assert replayed(reference, 3, [13, 14, 15])[0] == [13, 14, OTHER, OTHER]  # it ends


def test_trees() -> None:
    reference = [10, 11, 12, 13]
    # 9 and 11 follow the newest token; 12 follows each of them, 13 the right one's.
    tokens, executor = replayed(reference, 1, [9, 11, 12, 12, 13], [-1, -1, 0, 1, 3])
    assert tokens == [11, OTHER, 12, OTHER, 13, OTHER]
    assert executor.accepted == 3


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=12),
    st.lists(st.integers(0, 3), max_size=6),
    st.integers(1, 11),
)
def test_whatever_is_drafted_the_reference_comes_out(
    reference: list[int], draft: list[int], done: int
) -> None:
    done = min(done, len(reference) - 1)
    draft = draft[: len(reference) - done - 1]
    tokens, executor = replayed(reference, done, draft)
    taken = [tokens[0]]
    for guess, after in zip(Draft(draft).tokens, tokens[1:]):
        if guess != taken[-1]:
            break
        taken.append(after)
    assert taken == reference[done : done + len(taken)]
    assert len(taken) - 1 == executor.accepted


def test_verification_is_timed_against_the_plain_step() -> None:
    plans: list[StepPlan] = []

    class Noting(Fixed):
        limits = limits(pages=(9, 9), windows=(None, 8))

        def submit(self, plan: StepPlan) -> Handle:
            plans.append(plan)
            return super().submit(plan)

    executor = Noting()
    found = verify_cost(executor, 4, 50, turns=3)
    spans = [plan.spans[0] for plan in plans]
    assert [(span.start, len(span.tokens), len(span.rows)) for span in spans] == [
        (0, 32, 0),
        (32, 18, 0),
        *[(50, 1, 1), (50, 5, 5)] * 4,
    ]
    assert all(len(span.tables) == 2 and len(span.tables[0]) == 4 for span in spans)
    assert (found["drafted_tokens"], found["context"]) == (4, 50) and found["plain_ms"] > 0
    assert verify_cost(executor, 99, 9999, turns=1)["context"] < executor.limits.max_model_len


def test_text_workloads() -> None:
    text = range(1000)
    found = text_pairs(text, 3, 50, 20, seed=1)
    assert found == text_pairs(text, 3, 50, 20, seed=1) and set(found) == {"quote", "edit", "continue"}
    for quote, edit, follow in zip(found["quote"], found["edit"], found["continue"], strict=True):
        at = quote.prompt.index(quote.reference[0])
        assert quote.prompt[at : at + 20] == quote.reference
        same = sum(a == b for a, b in zip(quote.reference, edit.reference, strict=True))
        assert 10 < same <= 20
        assert follow.reference == tuple(range(follow.prompt[-1] + 1, follow.prompt[-1] + 21))
    assert any(q != e for q, e in zip(found["quote"], found["edit"]))
    with pytest.raises(ConfigError, match="the text has 1000 tokens, 1001"):
        text_pairs(text, 1, 900, 101, seed=1)
    assert len(set(token_pairs(100, 4, 5, 6, seed=1))) == 4


def test_prompts_with_references(shared: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(shared / "models" / "stories260K")
    path = tmp_path / "p.jsonl"
    answer = "Once upon a time there was a little girl who said hello to everyone."
    entries = [
        {"turns": ["Say it"], "reference": [answer], "category": "a"},
        {"turns": ["Say it again"], "reference": answer, "category": "a"},
        {"turns": ["No answer"], "category": "b"},
        {"turns": ["Short"], "reference": ["no"], "category": "c"},
        {"turns": ["Nested"], "reference": [["a", "b"]], "category": "d"},
    ]
    path.write_text("\n".join(map(json.dumps, entries)))
    found = prompt_pairs(path, tokenizer, 5, 40, 20)
    assert {name: len(pairs) for name, pairs in found.items()} == {"a": 2}
    assert found["a"][0].reference == tuple(tokenizer.encode(answer, add_special_tokens=False)[:20])
    with pytest.raises(ConfigError, match="raise --input-len"):
        prompt_pairs(path, tokenizer, 5, 1, 20)
    path.write_text("[]\n")
    with pytest.raises(ConfigError, match="line 1"):
        prompt_pairs(path, tokenizer, 5, 40, 20)


def test_nothing_to_measure() -> None:
    with pytest.raises(ConfigError, match="--speculative-config"):
        check_speculation(EngineConfig(model="m"))


def test_plain_decoding_follows_a_reference_too(shared: Path) -> None:
    from gossamer.bench.speculation import _replay, _Run, _side
    from gossamer.bench.workload import uncached

    config = EngineConfig(model=str(shared / "models" / "stories260K"), max_model_len=64)
    started = start(config)
    side = _side(replace(started, config=uncached(config)))
    run = _Run()
    _replay(side, Pair((1, 2, 3), tuple(range(30, 50))), run)
    assert (run.steps, run.tokens) == (19, 19) and 0 < run.decode < run.seconds


def test_quotes_are_accepted(shared: Path) -> None:
    config = EngineConfig(
        model=str(shared / "models" / "stories260K"),
        max_model_len=128,
        max_num_seqs=1,
        speculative_decoding=SpeculativeDecoding(method="ngram", adaptive=False),
    )
    work = text_pairs(range(100, 400), 2, 60, 30, seed=0) | {"random": token_pairs(500, 2, 60, 30, 0)}
    report = bench_speculation(start(config), work, 1)
    quote = report["workloads"]["quote"]
    assert quote["tokens_per_step"] > 2 and quote["acceptance_length"] > 2
    assert report["workloads"]["random"]["tokens_per_step"] < 1.1
    verify = report["verify_cost"]
    assert (verify["drafted_tokens"], verify["context"]) == (4, 60)
    assert verify["ratio"] == pytest.approx(verify["verify_ms"] / verify["plain_ms"], rel=0.02)
    assert report["worst"]["speedup"] == min(w["speedup"] for w in report["workloads"].values())
