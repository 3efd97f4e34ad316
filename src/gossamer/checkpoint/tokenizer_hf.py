"""tokenizer.json, or vocab.json + merges.txt, through the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.checkpoint.json_file import MAX_BYTES
from gossamer.checkpoint.token_pieces import alphabet_of
from gossamer.checkpoint.tokenizer_family import AddedToken, Family
from gossamer.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # type: ignore[import-untyped]

__all__ = ["HfEncoder"]

# Qwen2's split: as cl100k, but digits one by one (transformers, convert_slow_tokenizer.py).
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class HfEncoder:
    """A `tokenizers.Tokenizer` as `gossamer.checkpoint.tokenizer.Encoder`."""

    def __init__(self, inner: Tokenizer, source: str) -> None:
        self._inner = inner
        # A training file may carry its batch's truncation and padding; a prompt must never be cut.
        inner.no_truncation()
        inner.no_padding()
        decoder = json.loads(inner.decoder.__getstate__()) if inner.decoder is not None else {}
        self.alphabet, self.drops_space = alphabet_of(decoder, source)
        self.size = inner.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(
        cls, path: Path, config: Mapping[str, Any], added: Mapping[int, AddedToken], named: Sequence[str]
    ) -> HfEncoder:
        """From tokenizer.json. named: texts of special tokens, made special where the vocabulary has them.

        Raises TokenizerError when the file is damaged or too large.
        """
        from tokenizers import Tokenizer

        with _readable(path):
            if path.stat().st_size > MAX_BYTES:
                raise TokenizerError(f"{path} is larger than the {MAX_BYTES} bytes allowed for it")
            inner = Tokenizer.from_file(str(path))
            inner.encode_special_tokens = config.get("split_special_tokens") is True
            _add(inner, added, named, path)
            _set_prefix_space(inner, config)
            return cls(inner, str(path))

    @classmethod
    def build(
        cls, directory: Path, config: Mapping[str, Any], family: Family, added: Mapping[int, AddedToken]
    ) -> HfEncoder:
        """From vocab.json and merges.txt, split as the tokenizer class does.

        Raises TokenizerError when a file is damaged or the class's way of splitting is unknown.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        if family.byte_bpe is None:
            raise TokenizerError(
                f"{directory}: vocab.json does not say how {family.name or 'an unnamed'} tokenizer "
                "splits text (known: GPT2Tokenizer, Qwen2Tokenizer, GPTNeoXTokenizer). Write a "
                "tokenizer.json with transformers: AutoTokenizer.from_pretrained(..).save_pretrained(..)"
            )
        with _readable(directory / "vocab.json"):
            vocab, merges = str(directory / "vocab.json"), str(directory / "merges.txt")
            inner = Tokenizer(models.BPE.from_file(vocab, merges, fuse_unk=False))
            spaced = config.get("add_prefix_space") is True
            if family.byte_bpe == "qwen2":
                inner.normalizer = normalizers.NFC()
                split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated", invert=False)
                level = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)
                inner.pre_tokenizer = pre_tokenizers.Sequence([split, level])
            else:
                inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
            inner.decoder = decoders.ByteLevel()
            inner.encode_special_tokens = config.get("split_special_tokens") is True
            _add(inner, added, [], directory)
            return cls(inner, str(directory))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text; add_special_tokens runs the file's post-processor."""
        # The batch call alone lets other threads run meanwhile: a long text would stop a server.
        (found,) = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(found.ids)

    def piece(self, token: int) -> str | None:
        """Spelling of a token in the vocabulary."""
        found: str | None = self._inner.id_to_token(token)
        return found

    def id_of(self, piece: str) -> int | None:
        """Id of a spelling."""
        found: int | None = self._inner.token_to_id(piece)
        return found

    def added(self) -> Mapping[int, AddedToken]:
        """Tokens matched in raw text, by id."""
        return {
            token: AddedToken(
                each.content, each.special, each.normalized, each.lstrip, each.rstrip, each.single_word
            )
            for token, each in self._inner.get_added_tokens_decoder().items()
        }

    def to_json(self) -> dict[str, Any]:
        """tokenizer.json."""
        made: dict[str, Any] = json.loads(self._inner.to_str())
        return made

    def pieces(self) -> list[tuple[str, float, int]]:
        """There are none: tokens have no scores."""
        return []


def _add(inner: Tokenizer, added: Mapping[int, AddedToken], named: Sequence[str], source: Path) -> None:
    from tokenizers import AddedToken as Token

    for token, each in added.items():
        flags = {name: getattr(each, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        made = Token(each.content, special=each.special, **flags)
        (inner.add_special_tokens if each.special else inner.add_tokens)([made])
        got = inner.token_to_id(each.content)
        if got != token:
            raise TokenizerError(
                f"{source}: added token {each.content!r} has id {got}, but tokenizer_config.json says "
                f"{token}; the files belong to different tokenizers"
            )
    known = {each.content for each in inner.get_added_tokens_decoder().values()}
    # Without this a named token that the vocabulary merely contains would be split, and shown in answers.
    inner.add_special_tokens(
        [text for text in named if text not in known and inner.token_to_id(text) is not None]
    )


def _set_prefix_space(inner: Tokenizer, config: Mapping[str, Any]) -> None:
    """tokenizer_config.json's add_prefix_space wins over tokenizer.json's, as in transformers."""
    from tokenizers import pre_tokenizers

    state = json.loads(inner.pre_tokenizer.__getstate__()) if inner.pre_tokenizer is not None else {}
    wanted = config.get("add_prefix_space") is True
    if state.get("type") == "ByteLevel" and state["add_prefix_space"] != wanted:
        rest = {name: state[name] for name in ("trim_offsets", "use_regex")}
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=wanted, **rest)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what the library raises on a bad file into TokenizerError, Rust panics included."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as cause:
        # A panic is a BaseException of its own, so that `except Exception` would let it pass.
        if isinstance(cause, Exception) or type(cause).__name__ == "PanicException":
            raise TokenizerError(
                f"{path} cannot be read as a tokenizer ({cause}); download the file again"
            ) from None
        raise
