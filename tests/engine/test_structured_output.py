"""Grammars: masks against brute force, drafts and trees, what may not compile, and what that costs."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.grammar_compiler import GrammarCompiler
from gossamer.engine.request import SamplingParams, StructuredOutputs
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.step import Mask
from gossamer.engine.structured_output import Grammar
from gossamer.errors import RequestError

# 0 ends; 1 is spelled as nothing; then bytes, and words that overlap them.
WORDS = [
    b"ab",
    b"ba",
    b"aa",
    b"abc",
    b"bb",
    b'{"',
    b'":',
    b'"}',
    b"12",
    b"true",
    b" \n",
    "é".encode(),
    b'": "',
]
TOKENS = [b"", b"", *(bytes([byte]) for byte in range(256)), *WORDS]
END = 0
VOCAB = len(TOKENS)


def in_bytes(text: str) -> list[int]:
    return [2 + byte for byte in text.encode()]


def spaced(text: str) -> list[int]:
    """Like SentencePiece, which begins with a space."""
    return in_bytes(" " + text)


@pytest.fixture(scope="module", params=[in_bytes, spaced])
def compiler(request: pytest.FixtureRequest) -> GrammarCompiler:
    return GrammarCompiler(lambda: TOKENS, {}, request.param)


def start(compiler: GrammarCompiler, **wanted: Any) -> Grammar:
    return compiler.compile(StructuredOutputs(**wanted), (END,))()


def allowed(mask: Mask | None) -> set[int]:
    assert mask is not None and len(mask) == -(-VOCAB // 32) * 4
    assert not any(mask[t // 8] >> t % 8 & 1 for t in range(VOCAB, len(mask) * 8))
    return {token for token in range(VOCAB) if mask[token // 8] >> token % 8 & 1}


def now(grammar: Grammar) -> set[int]:
    return allowed(grammar.masks(None)[0])


def expected(language: set[bytes], so_far: bytes) -> set[int]:
    """Tokens after which a text of the language can still come, and the end where one is complete."""
    fits = {t for t, each in enumerate(TOKENS) if each and any(s.startswith(so_far + each) for s in language)}
    return fits | ({END} if so_far in language else set())


def check_against(grammar: Grammar, language: set[bytes], seed: int) -> None:
    """Random outputs, every mask on the way compared. Where only one byte can come, llguidance may insist on
    the token that the tokenizer would choose."""
    chance, so_far = random.Random(seed), b""
    while True:
        fits = now(grammar)
        possible = expected(language, so_far)
        forced = len({TOKENS[token][:1] for token in possible}) == 1
        assert fits == possible or (forced and fits and fits < possible), so_far
        assert grammar.ended == (fits == {END})
        token = chance.choice(sorted(fits))
        if token == END:
            assert so_far in language
            return
        grammar.accept(token)
        so_far += TOKENS[token]
        assert grammar.error == ""


@given(st.sets(st.text("abcé", min_size=1, max_size=5), min_size=1, max_size=8), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_choices_are_exactly_their_texts(compiler: GrammarCompiler, texts: set[str], seed: int) -> None:
    grammar = start(compiler, choice=sorted(texts))
    check_against(grammar, {text.encode() for text in texts}, seed)


# Expressions with the length of their longest text.
PATTERNS = st.recursive(
    st.sampled_from([("a", 1), ("b", 1), ("ab", 2), ("[abc]", 1), ("c?", 1), ("(?:a|bb)", 2)]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda two: (two[0][0] + two[1][0], two[0][1] + two[1][1])),
        st.tuples(inner, inner).map(lambda two: (f"(?:{two[0][0]}|{two[1][0]})", max(two[0][1], two[1][1]))),
        inner.map(lambda one: (f"(?:{one[0]}){{0,2}}", 2 * one[1])),
    ),
    max_leaves=4,
).filter(lambda one: one[1] <= 8)
TEXTS = ["".join(text) for n in range(9) for text in product("abc", repeat=n)]


@given(PATTERNS, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_expressions_are_what_re_says(compiler: GrammarCompiler, one: tuple[str, int], seed: int) -> None:
    language = {text.encode() for text in TEXTS if re.fullmatch(one[0], text)}
    check_against(start(compiler, regex=one[0]), language, seed)


SCHEMAS = st.recursive(
    st.sampled_from([
        {"type": "integer", "minimum": 0, "maximum": 99}, {"type": "boolean"}, {"enum": ["a", "ba", 3]},
        {"type": "string", "maxLength": 4, "pattern": "^[ab]*$"}, {"type": "null"},
    ]),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["a", "ab", "é"]), inner, max_size=3).map(
            lambda fields: {
                "type": "object", "properties": fields, "required": list(fields),
                "additionalProperties": False,
            }
        ),
        inner.map(lambda one: {"type": "array", "items": one, "maxItems": 3}),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=5,
)  # fmt: skip


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(conforms(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        fields = schema["properties"]
        return (
            isinstance(value, dict)
            and value.keys() == fields.keys()
            and all(conforms(value[name], each) for name, each in fields.items())
        )
    if kind == "array":
        return (
            isinstance(value, list) and len(value) <= 3 and all(conforms(v, schema["items"]) for v in value)
        )
    if kind == "integer":
        return type(value) is int and 0 <= value <= 99
    if kind == "string":
        return isinstance(value, str) and re.fullmatch("[ab]{0,4}", value) is not None
    return value is None if kind == "null" else isinstance(value, bool)


@given(SCHEMAS, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_json_conforms_to_its_schema(compiler: GrammarCompiler, schema: dict[str, Any], seed: int) -> None:
    try:
        grammar = start(compiler, json=schema)
    except RequestError as refused:
        # Two branches that llguidance cannot tell apart; it says so.
        assert "anyOf" in json.dumps(schema), refused
        return
    chance, out = random.Random(seed), b""
    for _ in range(500):
        fits = now(grammar)
        # Mostly no white space: there may be much of it.
        dense = {t for t in fits if not TOKENS[t].isspace()} if chance.random() < 0.9 else fits
        token = chance.choice(sorted(dense or fits))
        if token == END:
            assert conforms(json.loads(out), schema), out
            return
        grammar.accept(token)
        out += TOKENS[token]
    pytest.fail(f"no end after {out!r}")


def drafts() -> st.SearchStrategy[Draft]:
    """Chains and trees whose tokens fit often."""
    token = st.sampled_from([END, 2 + ord("a"), 2 + ord("b"), 2 + ord("c"), *range(258, 263)])

    @st.composite
    def made(draw: st.DrawFn) -> Draft:
        tokens = draw(st.lists(token, min_size=1, max_size=8))
        if draw(st.booleans()):
            return Draft(tokens)
        parents = [draw(st.integers(-1, i - 1)) for i in range(len(tokens))]
        kept = {}
        for i, pair in enumerate(zip(parents, tokens)):
            kept.setdefault(pair, i)
        if len(kept) < len(tokens):  # children of one parent are different tokens
            return Draft(tokens)
        return Draft(tokens, parents)

    return made()


def paths(draft: Draft) -> list[list[int]]:
    found: list[list[int]] = []
    for i, token in enumerate(draft.tokens):
        parent = i - 1 if draft.parents is None else draft.parents[i]
        found.append([*(found[parent] if parent >= 0 else []), token])
    return found


@given(st.lists(drafts(), min_size=1, max_size=6), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_a_draft_changes_nothing_and_its_masks_are_those_of_its_paths(
    compiler: GrammarCompiler, some: list[Draft], seed: int
) -> None:
    pattern = "(ab|ba|a{2,3}|bc)*c?(ab)?"
    grammar = start(compiler, regex=pattern)
    chance, history = random.Random(seed), list[int]()
    for draft in some:
        before = grammar.masks(None)
        masks = grammar.masks(draft)
        pruned = grammar.prune(draft)
        assert grammar.masks(None) == before == masks[:1]
        good = []
        for i, path in enumerate(paths(draft)):
            alone = start(compiler, regex=pattern)
            for token in history:
                alone.accept(token)
            fits = True
            for token in path:
                fits = fits and token != END and token in now(alone)
                if fits:
                    alone.accept(token)
            good.append(fits)
            assert allowed(masks[i + 1]) == (now(alone) if fits else set())
        kept = [path for path, fits in zip(paths(draft), good) if fits]
        assert (paths(pruned) if pruned else []) == kept
        choices = sorted(now(grammar) - {END})
        if not choices:
            assert grammar.ended
            return
        history.append(chance.choice(choices))
        grammar.accept(history[-1])


def test_outputs_of_one_request_go_their_own_ways(compiler: GrammarCompiler) -> None:
    factory = compiler.compile(StructuredOutputs(choice=["ab", "ba"]), (END,))
    one, two = factory(), factory()
    one.accept(2 + ord("a"))
    assert now(one) == {2 + ord("b")}
    assert now(two) == expected({b"ab", b"ba"}, b"")


def test_a_token_that_does_not_fit_is_an_error_of_that_output_alone(compiler: GrammarCompiler) -> None:
    factory = compiler.compile(StructuredOutputs(regex="ab+"), (END,))
    broken, other = factory(), factory()
    broken.accept(2 + ord("x"))
    assert broken.error and now(broken) == set() and not broken.ended
    assert broken.prune(Draft([2 + ord("b")])) is None
    assert not other.error and 2 + ord("a") in now(other)


def test_a_mask_that_needs_too_much_fails_that_output(compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
    grammar = start(compiler, json=schema)
    grammar.accept(2 + ord("{"))
    before = time.perf_counter()
    assert now(grammar) == set() and grammar.error
    assert time.perf_counter() - before < 0.5


def test_a_vocabulary_that_cannot_spell_the_text_says_so() -> None:
    words = GrammarCompiler(lambda: [b"", b"a", b"b"], {}, lambda text: [])
    grammar = words.compile(StructuredOutputs(choice=["ac"]), (END,))()
    grammar.accept(1)
    assert grammar.masks(None) == [bytes(4)] and "vocabulary" in grammar.error


def test_ends_only_where_the_request_says(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(StructuredOutputs(regex="a*"), ())()
    assert END not in now(grammar)
    grammar = compiler.compile(StructuredOutputs(regex="a"), ())()
    grammar.accept(2 + ord("a"))
    assert grammar.ended and not grammar.error and now(grammar) == set()


# Public reports of what brought servers of language models down: expressions that are wrong, backtrack or
# repeat without end (CVE-2025-48942, CVE-2025-48943), grammars that nest without end (CVE-2025-57809); and
# what a search for more of the kind found in llguidance: intersections, products and chains of rules.
def chain(count: int, step: str, last: str) -> str:
    """A grammar of so many rules, each naming the next."""
    rules = (step.format(this=f"{last}{i}", next=f"{last}{i + 1}") for i in range(count))
    return "\n".join([f"start: {last}0", *rules, f'{last}{count}: "a"'])


EITHER = [{"anyOf": [{"properties": {f"p{i}": {}}}, {"properties": {f"q{i}": {}}}]} for i in range(30)]
LETTERS = "abcdefghijklmnopqrst"
CIRCLE = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
BOMBS: dict[str, dict[str, Any]] = {
    "repeats": {"regex": "a{1000000}"},
    "repeats of repeats": {"regex": "(a{1,1000000000}){1,1000000000}"},
    "invalid": {"regex": "[a-"},
    "look-around": {"regex": "(?=a)b"},
    "parentheses": {"regex": "(" * 60_000 + "a" + ")" * 60_000},
    "intersection": {"json": {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in LETTERS]}},
    "multiples": {"json": {"type": "integer", "allOf": [{"multipleOf": p} for p in (9973, 9967, 9949)]}},
    "circle": {"json": {"$ref": "#"}},
    "circle of two": {"json": {"$defs": CIRCLE, "$ref": "#/$defs/a"}},
    "far away": {"json": {"$ref": "http://127.0.0.1:9/schema.json"}},
    "this machine": {"json": {"$ref": "file:///etc/passwd"}},
    "enum": {"json": {"enum": list(range(100_000))}},
    "deep as text": {"json": '{"items":' * 50_000 + "{}" + "}" * 50_000},
    "deep": {"json": '{"items":' * 100 + "{}" + "}" * 100},
    "product": {"json": {"allOf": EITHER}},
    "no number": {"json": {"type": "integer", "maximum": 10**400}},
    "type": {"json": {"type": "pattern"}},
    "chain of rules": {"grammar": chain(5000, '{this}: "x" {next} | "y"', "r")},
    "doubling": {"grammar": chain(60, "{this}: {next} {next}", "T")},
    "groups": {"grammar": "start: " + "(" * 60_000 + '"a"' + ")" * 60_000},
    "nothing": {"grammar": "start: a\na: a"},
    "import": {"grammar": '%import /etc/passwd\nstart: "a"'},
    "surrogate": {"json": {"const": "\ud800"}},
    "choices": {"choice": [str(i) for i in range(100_000)]},
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_in_an_error_within_a_second(compiler: GrammarCompiler, name: str) -> None:
    start(compiler, regex="a|b")  # the worker is there
    stop, gaps = threading.Event(), [0.0]

    def others() -> None:
        last = time.perf_counter()
        while not stop.wait(0.002):
            gaps[0] = max(gaps[0], time.perf_counter() - last)
            last = time.perf_counter()

    thread = threading.Thread(target=others)
    thread.start()
    spent = time.process_time()
    before = time.perf_counter()
    try:
        with pytest.raises(RequestError, match=r"^structured_outputs") as refused:
            start(compiler, **BOMBS[name])
        took = time.perf_counter() - before
    finally:
        stop.set()
        thread.join()
    assert len(str(refused.value)) < 350
    assert took < 1 or time.process_time() - spent < 0.3  # a busy machine may take longer, this process not
    assert gaps[0] < 0.5
    assert now(start(compiler, choice=["a"])) == {2 + ord("a")}


def test_refusals_are_remembered(compiler: GrammarCompiler) -> None:
    for _ in range(2):
        before = time.perf_counter()
        with pytest.raises(RequestError, match=r"0\.3 s"):
            start(compiler, **BOMBS["intersection"])
    assert time.perf_counter() - before < 0.05


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"json": {}, "regex": "a"},
        {"json": []},
        {"json": "["},
        {"json": "3"},
        {"json": {"a": float("nan")}},
        {"json": {"a": {1}}},
        {"regex": ""},
        {"regex": 5},
        {"grammar": b"start"},
        {"choice": []},
        {"choice": "ab"},
        {"choice": [""]},
        {"choice": [1]},
        {"choice": {"a": 1}},
        {"json_object": "yes"},
        {"json_object": 1},
    ],
)
def test_what_is_asked_for_is_checked(wanted: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^structured_outputs"):
        StructuredOutputs(**wanted)
    with pytest.raises(RequestError, match=r"^structured_outputs"):
        SamplingParams(structured_outputs=wanted)  # type: ignore[arg-type]


def test_a_mapping_will_do() -> None:
    params = SamplingParams(structured_outputs={"choice": ["a", "b", "a"]})  # type: ignore[arg-type]
    assert params.structured_outputs == StructuredOutputs(choice=("a", "b"))
    assert StructuredOutputs(json={"type": "null"}).json == '{"type": "null"}'
    with pytest.raises(RequestError, match="unknown key; known: json, regex, choice"):
        SamplingParams(structured_outputs={"whitespace_pattern": " "})  # type: ignore[arg-type]


def test_braces_that_repeat_nothing_are_no_bombs(compiler: GrammarCompiler) -> None:
    wanted = {"grammar": 'start: %json {"enum": [20000, 30000]}'}
    assert now(start(compiler, **wanted)) == {2 + ord("2"), 2 + ord("3")}
