"""Text files as windows of tokens."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.checkpoint.hub import resolve_model
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.compress.text import Windows, read_tokens
from gossamer.errors import CheckpointError, ConfigError

TEXT = "The old man shut the door.\nHe turned to the stranger, and smiled.\n" * 2000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model("gossamer/pocket"))


def test_plain_and_compressed_files_read_alike(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.xz"
    plain.write_text(TEXT)
    packed.write_bytes(lzma.compress(TEXT.encode()))
    ids = read_tokens([plain], tokenizer)
    assert tokenizer.decode(ids.tolist()) == TEXT
    np.testing.assert_array_equal(read_tokens([packed], tokenizer), ids)
    np.testing.assert_array_equal(read_tokens([plain, packed], tokenizer), np.tile(ids, 2))
    np.testing.assert_array_equal(read_tokens([plain, packed], tokenizer, len(ids) + 7)[: len(ids)], ids)
    assert len(read_tokens([plain, packed], tokenizer, len(ids) + 7)) == len(ids) + 7


def test_files_that_are_no_text_are_refused_by_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad, packed, empty = tmp_path / "bad.txt", tmp_path / "bad.xz", tmp_path / "empty.txt"
    bad.write_bytes(b"\xff\xfe\x80")
    packed.write_bytes(b"not xz")
    empty.write_text("")
    for path in (bad, packed, tmp_path / "absent.txt", tmp_path):
        with pytest.raises(CheckpointError, match=path.name):
            read_tokens([path], tokenizer)
    with pytest.raises(ConfigError, match="no text"):
        read_tokens([empty], tokenizer)


@given(st.integers(1, 9), st.integers(18, 200), st.integers(0, 5))
def test_an_epoch_covers_the_text_once_in_an_order_of_the_seed(length: int, count: int, seed: int) -> None:
    windows = Windows(np.arange(count, dtype=np.int32), length, seed)
    epoch = windows.batch(0, windows.per_epoch)
    assert (np.diff(epoch, axis=1) == 1).all()  # each is a stretch of the text
    assert len(set(epoch.flatten().tolist())) == epoch.size  # and none meets another
    again = Windows(np.arange(count, dtype=np.int32), length, seed)
    for position in (windows.per_epoch - 1, windows.per_epoch + 1, 0):
        np.testing.assert_array_equal(again.batch(position, 2), windows.batch(position, 2))


def test_a_text_too_short_for_its_windows_is_refused() -> None:
    with pytest.raises(ConfigError, match="9 tokens, and a window takes 5"):
        Windows(np.arange(9, dtype=np.int32), 5, 1)
