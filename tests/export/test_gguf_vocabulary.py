"""Real tokenizers through the metadata of GGUF and back: the same ids for awkward texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.checkpoint.gguf_tokenizer import bpe_tokenizer, tokenizer_json
from gossamer.checkpoint.hub import POCKET, resolve_model
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.errors import TokenizerError
from gossamer.export.gguf_vocabulary import OWN_SPLIT, vocabulary

from ..checkpoint.test_gguf_tokenizer import loaded, vectors

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def both(directory: Path, tmp_path: Path, extra: int = 3) -> tuple[Tokenizer, Tokenizer, dict, list[str]]:
    own = Tokenizer.load(directory)
    keys, notes = vocabulary(directory, own.vocab_size + extra)
    return own, loaded(tmp_path / "made", keys), keys, notes


@pytest.mark.parametrize(
    "source,pre,whole",
    [
        ("tokenizers/smollm2", "smollm", False),
        ("models/stories260K", "default", False),
        (POCKET, OWN_SPLIT, True),
    ],
)
def test_tokenizers_come_back_as_they_were(
    source: str, pre: str, whole: bool, shared: Path, tmp_path: Path
) -> None:
    directory = resolve_model(POCKET) if source == POCKET else shared / source
    own, made, keys, notes = both(directory, tmp_path)
    assert keys["tokenizer.ggml.pre"] == pre
    assert ("tokenizer.huggingface.json" in keys) == whole
    assert bool(notes) == (whole or source == "models/stories260K")
    texts = [text for text, _ in vectors(shared, "gpt-2")] + ["a<s>b</s>  c", "<|endoftext|>x <|endofbook|>"]
    for text in texts:
        assert made.encode(text) == own.encode(text), text
        assert made.decode(own.encode(text)) == own.decode(own.encode(text))
    assert (made.bos_id, made.eos_ids, made.special_ids) == (own.bos_id, own.eos_ids, own.special_ids)
    assert made.vocab_size == own.vocab_size  # what fills the vocabulary up is no token


def test_what_has_no_key_stands_whole_in_the_file(tmp_path: Path) -> None:
    whole = bpe_tokenizer(["a", "b", "ab", "Ã©"], [["a", "b"]], [], pre="gpt-2") | {
        "normalizer": {"type": "NFKC"}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    own, made, keys, notes = both(tmp_path, tmp_path)
    assert keys["tokenizer.ggml.pre"] == "gpt-2" and "more to text than GGUF" in notes[0]
    for text in ("\uff41\uff42", "abab", "a b"):
        assert made.encode(text) == own.encode(text)
    assert made.encode("\uff41\uff42") == [2]


def test_vocabularies_fill_the_models(shared: Path, tmp_path: Path) -> None:
    directory = shared / "models" / "stories260K"
    keys, _ = vocabulary(directory, 520)
    assert len(keys["tokenizer.ggml.tokens"]) == 520
    assert keys["tokenizer.ggml.tokens"][-1] == "[PAD519]" and keys["tokenizer.ggml.token_type"][-1] == 5
    assert len(tokenizer_json(keys, "m.gguf")["model"]["vocab"]) == 512
    with pytest.raises(TokenizerError, match="512 tokens and the model 500"):
        vocabulary(directory, 500)
    with pytest.raises(TokenizerError, match="no tokenizer"):
        vocabulary(tmp_path, 512)


def test_a_sentencepiece_model_needs_no_tokenizer_json(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    stories = shared / "models" / "stories260K"
    (tmp_path / "tokenizer.model").write_bytes((stories / "tok512.model").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    own, made, keys, _ = both(tmp_path, tmp_path)
    assert made.chat_template == TEMPLATE
    assert keys["tokenizer.ggml.model"] == "llama"
    for text in ("Once upon a time", "Lily's  two   balls", "ø ☃"):
        assert made.encode(text, False) == own.encode(text, False)
