"""Tokenizers made of GGUF vocabularies, against llama.cpp's own test vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.checkpoint.gguf_file import GGUFFile
from gossamer.checkpoint.gguf_tokenizer import SPLITS, bpe_tokenizer, tokenizer_config, tokenizer_json
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.errors import TokenizerError

TINY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "<|user|>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 4],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
}


def loaded(directory: Path, metadata: dict[str, Any]) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(metadata, "m.gguf")))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(metadata, "m.gguf")))
    return Tokenizer.load(directory)


def vectors(shared: Path, name: str) -> list[tuple[str, list[int]]]:
    base = shared / "tokenizers" / "vectors" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{base}.inp").read_text().split("\n__ggml_vocab_test__\n")
    ids = [[int(x) for x in line.split()] for line in Path(f"{base}.out").read_text().splitlines()]
    return list(zip(texts, ids, strict=False))


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "phi-3"])
def test_vocabularies_encode_the_test_vectors(name: str, shared: Path, tmp_path: Path) -> None:
    file = GGUFFile(shared / "tokenizers" / "vectors" / f"ggml-vocab-{name}.gguf")
    tokenizer = loaded(tmp_path, file.metadata)
    pairs = vectors(shared, name)
    assert len(pairs) > 40
    for text, ids in pairs:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.decode(ids) == text
    begins = name != "gpt-2"  # SentencePiece's begin with BOS unless the file says otherwise
    assert tokenizer.encode("Hi")[:1] == ([1] if begins else tokenizer.encode("Hi", False)[:1])


def test_qwen2s_split_is_that_of_its_tokenizer_class(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    own = Tokenizer.load(tmp_path).to_json()
    made = bpe_tokenizer(["a"], [], [], pre="qwen2")
    assert own is not None
    assert (made["pre_tokenizer"], made["normalizer"]) == (own["pre_tokenizer"], own["normalizer"])


@pytest.mark.parametrize("name,pre", [("llama-bpe", "llama-bpe"), ("falcon", "falcon")])
def test_splits_never_join_what_the_vectors_keep_apart(name: str, pre: str, shared: Path) -> None:
    """Without their vocabularies: a text is cut into at most as many words as it has tokens."""
    from tokenizers import Tokenizer as Inner  # type: ignore[import-untyped]

    level = Inner.from_str(json.dumps(bpe_tokenizer(["a"], [], [], pre=pre))).pre_tokenizer
    for text, ids in vectors(shared, name):
        words = level.pre_tokenize_str(text)
        assert len(words) <= len(ids), (text, words)
        assert [span[1][0] for span in words] == sorted(span[1][0] for span in words)


def test_special_tokens_are_found_in_text_and_those_of_users_are_shown(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, TINY)
    assert tokenizer.encode("ab<s>a<|user|>b", False) == [2, 3, 0, 4, 1]
    assert tokenizer.decode([2, 3, 0, 4]) == "aba<|user|>"
    assert (tokenizer.bos_id, tokenizer.encode("ab")) == (3, [2])  # GPT-2's begin with nothing
    begun = loaded(tmp_path / "b", TINY | {"tokenizer.ggml.add_bos_token": True})
    assert begun.encode("ab") == [3, 2]


def test_chat_templates_come_along(tmp_path: Path) -> None:
    one = TINY | {"tokenizer.chat_template": "{{ messages[0].content }}"}
    assert loaded(tmp_path, one).chat_template == "{{ messages[0].content }}"
    two = one | {"tokenizer.chat_templates": ["tools"], "tokenizer.chat_template.tools": "T"}
    names = [each["name"] for each in tokenizer_config(two, "m.gguf")["chat_template"]]
    assert names == ["default", "tools"]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"tokenizer.ggml.pre": "viking"}, "'viking'.*known are gpt-2"),
        ({"tokenizer.ggml.model": "t5"}, "kind 't5'"),
        ({"tokenizer.ggml.tokens": ["a", "a", "b", "c", "d"]}, "'a' is there twice"),
        ({"tokenizer.ggml.tokens": 5}, "tokens is 5"),
        ({"tokenizer.ggml.token_type": [1]}, "1 entries and there are 5"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "not of two pieces"),
        ({"tokenizer.ggml.merges": None}, "merges is None"),
        ({"tokenizer.huggingface.json": "{"}, "not valid JSON"),
    ],
)
def test_vocabularies_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer_json(TINY | change, "m.gguf")


def test_every_split_can_be_compiled() -> None:
    from tokenizers import Tokenizer as Inner

    for pre in SPLITS:
        Inner.from_str(json.dumps(bpe_tokenizer(["a"], [], [], pre=pre)))
