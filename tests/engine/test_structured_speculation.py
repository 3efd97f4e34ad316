"""Grammars and drafts together: what is drafted changes no output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.engine import Engine
from gossamer.engine.grammar_compiler import GrammarCompiler
from gossamer.engine.request import Request, SamplingParams, StructuredOutputs
from tests.engine.serving import VOCAB, Client, make

LETTERS = [b"", *(bytes([byte]) for byte in b"abcdefgh"), b"ab", b"ba", b"abc", b"cab"]
END = 0
NGRAM, TREES = (
    SimpleNamespace(
        method="ngram",
        num_speculative_tokens=6,
        prompt_lookup_min=1,
        prompt_lookup_max=4,
        tree_width=width,
        adaptive=False,
    )
    for width in (1, 3)
)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokens = LETTERS + [b""] * (VOCAB - len(LETTERS))
    return GrammarCompiler(lambda: tokens, {}, lambda text: [1 + b"abcdefgh".index(c) for c in text.encode()])


def run(requests: list[Request], speculation: Any) -> tuple[dict[Any, Any], Engine]:
    engine = make(speculation=speculation)
    got = Client(engine).run(*requests)
    return {name: (one.tokens, one.reason, one.stop_reason) for name, one in got.items()}, engine


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["(ab|ba|c){0,12}", "(abc){9}", "[ab]{20}d?", "a*", "(cab|ab){1,6}(d|ef){3}"]),
            st.lists(st.integers(1, len(LETTERS) - 1), min_size=1, max_size=20),
            st.integers(1, 30),
            st.integers(1, 2),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=40, deadline=None)
def test_outputs_are_the_same_with_and_without_drafts(compiler: GrammarCompiler, some: list[Any]) -> None:
    requests = [
        Request(
            id=str(i),
            prompt_ids=tuple(prompt),
            params=SamplingParams(max_tokens=length, n=n, seed=i),
            eos_ids=(END,),
            grammar=compiler.compile(StructuredOutputs(regex=pattern), (END,)),
        )
        for i, (pattern, prompt, length, n) in enumerate(some)
    ]
    plain, _ = run(requests, None)
    for how in (NGRAM, TREES):
        assert run(requests, how)[0] == plain
    for (name, _), (tokens, reason, _) in plain.items():
        grammar = requests[int(name)].grammar
        assert grammar is not None and reason in ("stop", "length")
        state = grammar()
        for token in tokens:
            mask = state.masks(None)[0]
            assert mask is not None and mask[token // 8] >> token % 8 & 1
            if token != END:
                state.accept(token)


def test_drafts_are_accepted_within_a_grammar(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(StructuredOutputs(regex="(a|b)?(abc){12}"), (END,))
    request = Request(
        id="r",
        prompt_ids=(1, 2, 3) * 4,
        params=SamplingParams(max_tokens=60),
        eos_ids=(END,),
        grammar=grammar,
    )
    _, engine = run([request], NGRAM)
    assert engine.stats().accepted > 0


@pytest.mark.parametrize("speculation", [None, NGRAM])
@pytest.mark.parametrize("limits", [{"max_tokens": 3}, {"max_tokens": 2}, {"max_tokens": 9, "min_tokens": 6}])
def test_a_complete_output_stops_at_its_limit_and_before_min_tokens(
    compiler: GrammarCompiler, limits: dict[str, int], speculation: Any
) -> None:
    """Three tokens, since no pair of them is one: a limit of two cuts them, one of three does not."""
    grammar = compiler.compile(StructuredOutputs(regex="efg"), (END,))
    params = SamplingParams(seed=1, **limits)  # type: ignore[arg-type]
    request = Request(id="a", prompt_ids=(5, 6, 7, 5, 6), params=params, eos_ids=(END,), grammar=grammar)
    got, _ = run([request], speculation)
    tokens, reason, _ = got["a", 0]
    cut = limits["max_tokens"] == 2
    assert (tokens, reason) == ([5, 6] if cut else [5, 6, 7], "length" if cut else "stop")
