"""Token ids and text: against public vectors, transformers, and the sentencepiece library itself."""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.errors import CheckpointError, DependencyError, RequestError, TokenizerError

TEXTS = [
    "", " ", "Once upon a time", "  two  spaces  ",
    "Ünïcödé ✓ 日本語 🙂 👩‍👩‍👧", "a\n\n\tb\r\n", "e\u0301 é ﬁ",
    "<s>x</s> y", "<|endoftext|>a<|im_start|> b <|im_end|>", "don't DON'T 1234567 3.14", "<unk> [PAD]",
    "\x00\x7f",
]  # fmt: skip
NAMES = [
    "tokenizers/qwen2",
    "tokenizers/smollm2",
    "tokenizers/gpt2",
    "tokenizers/gpt-neox",
    "models/stories260K",
]


@cache
def ours(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


@cache
def theirs(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    if (directory / "tokenizer_config.json").exists():
        return transformers.AutoTokenizer.from_pretrained(directory)
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))


@pytest.mark.parametrize("name", NAMES)
def test_same_as_transformers(shared: Path, name: str) -> None:
    tokenizer, oracle = ours(shared / name), theirs(shared / name)
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer.encode(text, special)
            assert ids == oracle.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert tokenizer.decode(ids, skip) == oracle.decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.bos_id == oracle.bos_token_id
    assert oracle.eos_token_id is None or oracle.eos_token_id == tokenizer.eos_ids[0]
    assert tokenizer.special_ids == {
        token for token, added in oracle.added_tokens_decoder.items() if added.special
    }
    for key, value in oracle.special_tokens_map.items():
        assert tokenizer.special_tokens[key] == value


@pytest.mark.parametrize("name", NAMES[:-1])
def test_random_ids_decode_as_the_tokenizers_library_does(shared: Path, name: str) -> None:
    tokenizer, oracle = ours(shared / name), theirs(shared / name)
    rng = random.Random(0)
    for skip in (True, False):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(4000)]
        expected = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip) == expected


def vectors(shared: Path, name: str) -> list[tuple[str, list[int]]]:
    base = shared / "tokenizers" / "vectors" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{base}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{base}.out").read_text().splitlines()
    pairs = [(text, [int(token) for token in line.split()]) for text, line in zip(texts, lines)]
    assert len(pairs) == len(lines) >= 40
    return pairs


@pytest.mark.parametrize(("name", "directory"), [("gpt-2", "gpt2"), ("qwen2", "qwen2"), ("mpt", "gpt-neox")])
def test_public_vectors(shared: Path, name: str, directory: str) -> None:
    tokenizer = ours(shared / "tokenizers" / directory)
    for text, expected in vectors(shared, name):
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text


def test_tokens_as_bytes(shared: Path) -> None:
    for name in NAMES:
        tokenizer = ours(shared / name)
        text = " Ünïcödé 日本 🙂\n"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == text.strip()
        assert tokenizer.token_bytes(10**7) == b"" == tokenizer.token_bytes(2**40)
        assert tokenizer.decode([10**7]) == ""
        with pytest.raises(RequestError, match="-1 is negative"):
            tokenizer.decode([-1])
    neox = ours(shared / "tokenizers" / "gpt-neox")
    assert neox.token_text(neox.encode(" the")[0]) == " the"
    stories = ours(shared / "models" / "stories260K")
    assert stories.token_bytes(3) == b"\x00" and stories.token_text(stories.encode("a")[1]).startswith(" ")
    assert stories.token_text(0x80 + 3) == "�"


def test_lone_surrogate_is_the_users_mistake(shared: Path) -> None:
    with pytest.raises(RequestError, match="position 2"):
        ours(shared / "tokenizers/gpt2").encode("ab\ud800")


def copy(source: Path, target: Path, *names: str, **config: Any) -> Path:
    target.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(source / name, target / name)
    if config:
        path = target / "tokenizer_config.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({k: v for k, v in (old | config).items() if v != "ABSENT"}))
    return target


@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": "ABSENT"},
        {"tokenizer_class": "PreTrainedTokenizerFast"}, {"bos_token": "</s>"},
        {"added_tokens_decoder": {"9": {"content": "▁l", "special": True}}, "eos_token": "▁l"},
    ],
)  # fmt: skip
def test_affixes_and_added_tokens_follow_the_config(shared: Path, tmp_path: Path, config: Any) -> None:
    source = shared / "models" / "stories260K"
    directory = copy(source, tmp_path, "tokenizer.json", "tokenizer_config.json", **config)
    if "added_tokens_decoder" in config:
        token = ours(source).id_of("▁l")
        config["added_tokens_decoder"] = {str(token): {"content": "▁l", "special": True}}
        copy(source, tmp_path, **config)
    tokenizer, oracle = Tokenizer.load(directory), theirs(directory)
    for text in ("Hello", "a ▁l b</s>"):
        assert tokenizer.encode(text) == oracle.encode(text)
        assert tokenizer.decode(oracle.encode(text)) == oracle.decode(
            oracle.encode(text), skip_special_tokens=True
        )
    assert tokenizer.eos_ids[0] == oracle.eos_token_id


def test_ends_of_all_files_count(shared: Path, tmp_path: Path) -> None:
    directory = copy(shared / "models/stories260K", tmp_path, "tokenizer.json", "tokenizer_config.json")
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    assert Tokenizer.load(directory).eos_ids == (2, 5)


def test_prefix_space_of_the_config_wins(shared: Path, tmp_path: Path) -> None:
    directory = copy(shared / "tokenizers/gpt2", tmp_path, "tokenizer.json", add_prefix_space=True,
                     tokenizer_class="GPT2Tokenizer")  # fmt: skip
    tokenizer = Tokenizer.load(directory)
    assert (
        tokenizer.encode("the")
        == theirs(directory).encode("the")
        == ours(shared / "tokenizers/gpt2").encode(" the")
    )


def test_damage_is_a_clear_error(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"looked for tokenizer.json, vocab.json.*tokenizer.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        Tokenizer.load(tmp_path / "absent")
    path = tmp_path / "tokenizer.json"
    good = (shared / "models/stories260K/tokenizer.json").read_text()
    for text in (
        "",
        "{}",
        good[:-9],
        good.replace('"Fuse"', '"Confuse"'),
        "\x00",
        good.replace("BPE", "BBQ"),
    ):
        path.write_text(text)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    data = json.loads(good)
    for decoder in (None, {"type": "WordPiece", "prefix": "##", "cleanup": True}):
        path.write_text(json.dumps(data | {"decoder": decoder}))
        with pytest.raises(TokenizerError, match="is not supported"):
            Tokenizer.load(tmp_path)
    path.write_text(good)
    for config in (
        {"tokenizer_class": 3}, {"bos_token": 3}, {"additional_special_tokens": "x"},
        {"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"x": {"content": "y"}}},
        {"added_tokens_decoder": {"7": {"content": "</s>"}}},
        {"added_tokens_decoder": {"7": {"content": "y", "lstrip": 1}}}, {"chat_template": 5},
    ):  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(TokenizerError):
            Tokenizer.load(tmp_path)


def test_byte_level_vocabulary_needs_a_known_class(shared: Path, tmp_path: Path) -> None:
    directory = copy(
        shared / "tokenizers/qwen2", tmp_path, "vocab.json", "merges.txt", tokenizer_class="XTokenizer"
    )
    with pytest.raises(TokenizerError, match=r"how X tokenizer splits.*save_pretrained"):
        Tokenizer.load(directory)
    copy(directory, directory, tokenizer_class="GPT2Tokenizer")
    (directory / "merges.txt").write_text("a b c\n")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(directory)


# tokenizer.model


def gguf_metadata(path: Path) -> dict[str, Any]:
    """Key-value section of a GGUF file (ggml/docs/gguf.md), enough to rebuild a tokenizer.model."""
    formats = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def number(file: BinaryIO, kind: str) -> Any:
        return struct.unpack("<" + kind, file.read(struct.calcsize(kind)))[0]

    def value(file: BinaryIO, kind: int) -> Any:
        if kind == 8:
            return file.read(number(file, "Q")).decode()
        if kind == 9:
            inner, count = number(file, "I"), number(file, "Q")
            return [value(file, inner) for _ in range(count)]
        return number(file, formats[kind])

    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        file.read(12)
        count = number(file, "Q")
        return {value(file, 8): value(file, number(file, "I")) for _ in range(count)}


def sentencepiece_model(tokens: list[str], scores: list[float], kinds: list[int]) -> bytes:
    """A BPE ModelProto (sentencepiece_model.proto): pieces, trainer_spec, normalizer_spec."""

    def varint(number: int) -> bytes:
        return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)

    def message(field: int, data: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(data)) + data

    pieces = b"".join(
        message(1, message(1, token.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))
        for token, score, kind in zip(tokens, scores, kinds)
    )
    trainer = b"\x18\x02" + varint(35 << 3) + b"\x01"  # model_type BPE, byte_fallback
    normalizer = message(1, b"identity") + b"\x18\x01\x20\x00\x28\x01"  # dummy prefix, keep spaces, escape
    return pieces + message(2, trainer) + message(3, normalizer)


@pytest.fixture(scope="module")
def llama(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-2's tokenizer.model, rebuilt from the vocabulary in a GGUF file."""
    pytest.importorskip("sentencepiece")
    data = gguf_metadata(shared / "tokenizers/vectors/ggml-vocab-llama-spm.gguf")
    columns = (data[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    directory = tmp_path_factory.mktemp("llama")
    (directory / "tokenizer.model").write_bytes(sentencepiece_model(*columns))
    (directory / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    return directory


def test_sentencepiece_vectors(llama: Path, shared: Path) -> None:
    tokenizer = ours(llama)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (32000, 1, (2,))
    assert tokenizer.special_ids == {0, 1, 2} and tokenizer.drops_space
    for text, expected in vectors(shared, "llama-spm"):
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text
        assert tokenizer.encode(text) == [1, *expected]
        assert tokenizer.decode([1, *expected]) == text


def test_sentencepiece_legacy_flag(llama: Path, tmp_path: Path) -> None:
    """The example of transformers' LlamaTokenizerFast docstring."""
    assert ours(llama).encode("Hello <s>.") == [1, 15043, 29871, 1, 869]
    directory = copy(llama, tmp_path, "tokenizer.model", "config.json", legacy=False)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("Hello <s>.") == [1, 15043, 29871, 1, 29889]
    ids = tokenizer.encode("<s>  x", add_special_tokens=False)
    assert ids[0] == 1 and tokenizer.decode(ids, skip_special_tokens=False) == "<s>  x"


def test_sentencepiece_added_tokens(llama: Path, tmp_path: Path) -> None:
    added = {
        "32000": {"content": "<|end|>", "special": True, "rstrip": True},
        "32001": {"content": "<|end|>!"},
    }
    copy(
        llama,
        tmp_path,
        "tokenizer.model",
        added_tokens_decoder=added,
        eos_token="<|end|>",
        add_bos_token=False,
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("Hi<|end|>  \n<|end|>!") == [*ours(llama).encode("Hi", False), 32000, 32001]
    assert tokenizer.decode([32000, 32001]) == "<|end|>!" and tokenizer.eos_ids == (32000,)
    assert tokenizer.vocab_size == 32002 and tokenizer.id_of("nothing of the kind") is None


def test_sentencepiece_model_equals_its_tokenizer_json(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    source = shared / "models" / "stories260K"
    shutil.copy(source / "tok512.model", tmp_path / "tokenizer.model")
    copy(source, tmp_path, "tokenizer_config.json", "config.json")
    model, file = Tokenizer.load(tmp_path), ours(source)
    for text in TEXTS:
        if "<" not in text and "\x00" not in text:
            assert model.encode(text) == file.encode(text), text


def test_sentencepiece_absent_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xffjunk")
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DependencyError, match=r"pip install 'gossamer\[sentencepiece\]'"):
        Tokenizer.load(tmp_path)


def test_other_threads_run_while_a_long_text_is_encoded(shared: Path) -> None:
    tokenizer = ours(shared / "models/stories260K")
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(tokenizer.encode, "a" * 300_000)
        turns = 0
        while not running.done():
            time.sleep(0.001)
            turns += 1
    assert len(running.result()) > 100_000
    assert turns > 10  # one, had encoding held the interpreter
