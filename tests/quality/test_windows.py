"""Every token of a text is predicted once, with what was promised before it."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.checkpoint.hub import resolve_model
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.errors import ConfigError
from gossamer.quality.windows import (
    Document,
    Text,
    fair_shares,
    first_windows,
    read_documents,
    read_texts,
    tokens_hash,
    windows_of,
)

BOS = -1


def document(count: int) -> Document:
    ids = np.arange(count, dtype=np.int32)
    return Document("counted", ids, np.ones(count))


@given(count=st.integers(2, 200), context=st.integers(2, 40), share=st.floats(0.01, 1), begins=st.booleans())
def test_every_token_is_predicted_once_with_enough_before_it(
    count: int, context: int, share: float, begins: bool
) -> None:
    stride = max(1, round((context - 1) * share))
    windows = windows_of(document(count), 3, context, stride, BOS if begins else None)
    assert all(window.document == 3 for window in windows)
    predicted: list[int] = []
    for window in windows:
        targets = window.targets.tolist()
        ids = window.ids.tolist()
        assert len(ids) + 1 <= context  # with the last target, which nobody needs to compute
        assert (ids[0] == BOS) == begins
        inner = ids[begins:]
        assert inner == list(
            range(targets[-1] - len(inner), targets[-1])
        )  # what is computed is what comes before
        if predicted:
            assert len(ids) - len(targets) + 1 >= context - stride
        predicted += targets
    assert predicted == list(range(0 if begins else 1, count))


def test_windows_are_those_of_transformers_page() -> None:
    """begin = i * stride, end = begin + context, and the targets behind the end before."""
    for count in (5, 8, 9, 10, 19, 20, 21):
        expected, before = [], 1
        for begin in range(0, count, 3):
            end = min(begin + 8, count)
            expected.append((list(range(begin, end - 1)), list(range(before, end))))
            before = end
            if end == count:
                break
        found = [(w.ids.tolist(), w.targets.tolist()) for w in windows_of(document(count), 0, 8, 3, None)]
        assert found == expected


@pytest.mark.parametrize("context, stride", [(1, 1), (8, 0), (8, 8), (8, -1)])
def test_a_stride_that_would_leave_tokens_out_is_refused(context: int, stride: int) -> None:
    with pytest.raises(ConfigError, match="stride from 1 to"):
        windows_of(document(20), 0, context, stride, None)


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8), most=st.integers(1, 200))
def test_shares_are_fair(sizes: list[int], most: int) -> None:
    if most < len(sizes):
        with pytest.raises(ConfigError, match="--max-tokens"):
            fair_shares(sizes, most)
        return
    shares = fair_shares(sizes, most)
    assert sum(shares) == min(most, sum(sizes))
    cut = [share for size, share in zip(sizes, shares) if share < size]
    assert all(share <= size for size, share in zip(sizes, shares))
    assert not cut or (max(cut) - min(cut) <= 1 and min(cut) >= max(shares) - 1)


@given(most=st.integers(1, 60))
def test_some_windows_are_spread_over_all(most: int) -> None:
    windows = windows_of(document(100), 0, 8, 4, None)
    some = first_windows(windows, most)
    assert 1 <= len(some) <= len(windows)
    assert len({id(window) for window in some}) == len(some)
    assert first_windows(windows, 1000) == windows


def test_bytes_are_those_of_the_text(shared: Path) -> None:
    text = Text("t", "It was a dark night.\n\tÉmile said: «no».  Ω!\n")
    for model in (resolve_model("gossamer/pocket"), shared / "models" / "stories260K"):
        tokenizer = Tokenizer.load(model)
        (whole,) = read_documents([text], tokenizer, bos=tokenizer.bos_id)
        assert whole.bytes.sum() == pytest.approx(len(text.text.encode()))
        lossless = tokenizer.decode(whole.ids.tolist()) == text.text
        assert lossless == (whole.bytes % 1 == 0).all()  # one of them drops the second of two spaces
        (cut,) = read_documents([text], tokenizer, bos=tokenizer.bos_id, most=4)
        assert cut.ids.tolist() == whole.ids[:4].tolist()
        assert cut.bytes.tolist() == whole.bytes[:4].tolist()
        (without,) = read_documents([text], tokenizer, most=4)  # the first is not predicted
        assert without.ids.tolist() == whole.ids[:5].tolist()
        assert tokens_hash([cut]) != tokens_hash([without])


def test_only_the_beginning_of_a_long_text_is_read() -> None:
    tokenizer = Tokenizer.load(resolve_model("gossamer/pocket"))
    text = "The old man went down to the sea. " * 2000
    (whole,), (cut,) = (
        read_documents([Text("t", t)], tokenizer, bos=0, most=most) for t, most in ((text, None), (text, 50))
    )
    assert cut.ids.tolist() == whole.ids[:50].tolist()


def test_texts_are_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Größe", encoding="utf-8")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"packed"))
    assert [t.text for t in read_texts([tmp_path / "a.txt", tmp_path / "b.txt.xz"])] == ["Größe", "packed"]
    (tmp_path / "latin").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "bad.xz").write_bytes(b"no")
    for name, said in (
        ("latin", "not UTF-8"),
        ("empty", "is empty"),
        ("bad.xz", "xz"),
        ("none", "cannot read"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_texts([tmp_path / name])
    tokenizer = Tokenizer.load(resolve_model("gossamer/pocket"))
    with pytest.raises(ConfigError, match="of 1 tokens"):
        read_documents([Text("t", "a")], tokenizer)
