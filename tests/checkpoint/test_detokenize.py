"""Text as it streams: always the text of all tokens together, never half a character."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gossamer.checkpoint.detokenize import IncrementalDetokenizer, StopChecker
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.errors import RequestError

NAMES = ["tokenizers/smollm2", "models/stories260K"]
TEXT = "  Ünïcödé ✓ 日本語 🙂 👩‍👩‍👧 and plain\n\ttext, <s>marked</s> <|im_end|> and more."


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest, shared: Path) -> Tokenizer:
    return Tokenizer.load(shared / request.param)


def stream(
    tokenizer: Tokenizer, ids: list[int], skip: bool = True, prompt: tuple[int, ...] = ()
) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@pytest.mark.parametrize("skip", [True, False])
def test_pieces_are_the_text(tokenizer: Tokenizer, skip: bool) -> None:
    ids = tokenizer.encode(TEXT)
    pieces = stream(tokenizer, ids, skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip)
    assert not any("�" in piece for piece in pieces)
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size + 9) for _ in range(rng.randrange(40))]
        assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


def test_random_bytes(tokenizer: Tokenizer) -> None:
    """Tokens of single bytes, most of them invalid UTF-8."""
    single = {tokenizer.token_bytes(n): n for n in range(tokenizer.vocab_size)}
    ids_of = [single[bytes([b])] for b in range(256) if bytes([b]) in single]
    rng = random.Random(1)
    for _ in range(300):
        ids = rng.choices(ids_of, k=rng.randrange(12))
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_appears_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂a", add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert pieces[-1] == "" and pieces[-2].endswith("a") and "".join(pieces).endswith("🙂a")


def test_continues_a_prompt(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("One 🙂 two three", add_special_tokens=False)
    whole = b"".join(map(tokenizer.token_bytes, ids))
    for cut in range(len(ids) + 1):
        head = b"".join(map(tokenizer.token_bytes, ids[:cut])).decode(errors="ignore")
        got = "".join(stream(tokenizer, ids[cut:], prompt=tuple(ids[:cut])))
        expected = whole.decode()[len(head) :]
        assert got == (expected if cut else tokenizer.decode(ids))
    assert tokenizer.bos_id is not None
    assert "".join(stream(tokenizer, ids, prompt=(tokenizer.bos_id,))) == tokenizer.decode(ids)


def cut_at_stop(text: str, stop: list[str], include: bool) -> tuple[str, bool]:
    """Reading character by character: the definition."""
    for end in range(len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            return text[: end if include else end - max(map(len, hits))], True
    return text, False


@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
@example(pieces=["ab", "c", "d"], stop=["bcd", "cd"], include=False)
@example(pieces=["aa", "a", "b"], stop=["aab"], include=True)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stop: list[str], include: bool) -> None:
    checker = StopChecker(stop, include)
    shown, stopped = "", False
    for piece in pieces:
        text, stopped = checker.push(piece)
        shown += text
        # Nothing is ever shown that a stop string would take back.
        assert cut_at_stop("".join(pieces), stop, include)[0].startswith(shown)
    shown += checker.finish()
    assert (shown, stopped) == cut_at_stop("".join(pieces), stop, include)
    assert stopped == (checker.matched in stop)


def test_only_what_may_begin_a_stop_is_held() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert checker.push("Hello\n") == ("Hello", False)
    assert checker.push("world\n\nUs") == ("\nworld", False)
    assert checker.push("er: x") == ("", True)
    assert checker.matched == "\n\nUser:" and checker.push("more") == ("", True) and checker.finish() == ""
    assert StopChecker([]).push("x") == ("x", False)
    with pytest.raises(RequestError, match="empty"):
        StopChecker(["a", ""])
