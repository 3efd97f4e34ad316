"""Text <-> token ids, as transformers' AutoTokenizer would do it, from the files of a checkpoint.

Two differences on purpose: `clean_up_tokenization_spaces` is ignored (it is lossy, and a stream cannot
take back a space it has sent), and a run of byte tokens that is invalid UTF-8 loses only its invalid
bytes, not the characters before them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gossamer.checkpoint.chat_template import read_templates
from gossamer.checkpoint.generation_config import read_generation_config
from gossamer.checkpoint.json_file import read_json_object
from gossamer.checkpoint.token_pieces import Alphabet, piece_bytes
from gossamer.checkpoint.tokenizer_family import SPECIAL_NAMES, AddedToken, Family, family_of
from gossamer.errors import CheckpointError, RequestError, TokenizerError

__all__ = ["Tokenizer", "has_tokenizer"]

_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


class Encoder(Protocol):
    """What reads the vocabulary: the `tokenizers` or the `sentencepiece` library behind one face."""

    alphabet: Alphabet
    drops_space: bool
    size: int

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def piece(self, token: int) -> str | None: ...
    def id_of(self, piece: str) -> int | None: ...
    def added(self) -> Mapping[int, AddedToken]: ...
    def to_json(self) -> dict[str, Any] | None: ...
    def pieces(self) -> list[tuple[str, float, int]]: ...


class Tokenizer:
    """A checkpoint's tokenizer; make it with `Tokenizer.load`.

    vocab_size: number of tokens, added ones included (the model's logits may be wider, padded).
    bos_id: the token that begins a text, or None; eos_ids: every token that ends one, from
    tokenizer_config.json, generation_config.json and config.json together. special_ids: tokens that
    `decode` leaves out by default. special_tokens: name ("bos_token", ...) -> text, for chat templates.
    chat_template: the default template's text, or None.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        special_tokens: Mapping[str, str | list[str]],
        eos_ids: Iterable[int] = (),
        prefix: tuple[int, ...] = (),
        suffix: tuple[int, ...] = (),
        own_affixes: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self._encoder = encoder
        self._prefix, self._suffix, self._own_affixes = prefix, suffix, own_affixes
        self._bytes: dict[int, bytes] = {}
        self._added = dict(encoder.added())
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.vocab_size = encoder.size
        self.drops_space = encoder.drops_space
        self.alphabet = encoder.alphabet
        self.bos_id = self._named("bos_token")
        self.special_ids = frozenset(token for token, added in self._added.items() if added.special)
        own_end = self._named("eos_token")
        self.eos_ids = tuple(dict.fromkeys([*([] if own_end is None else [own_end]), *eos_ids]))

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a model directory: tokenizer.json, vocab.json + merges.txt or tokenizer.model.

        Raises TokenizerError when there is none or it is damaged, DependencyError when tokenizer.model
        needs the sentencepiece library.
        """
        directory = Path(directory)
        config = _optional(directory / "tokenizer_config.json")
        model_config = _optional(directory / "config.json")
        family = family_of(config, model_config)
        special = _special_tokens(directory, config, family)
        added = _added_tokens(directory, config, special)
        encoder, from_file = _open(directory, config, family, added, special)
        begin, end = family.affixes(config, from_file)
        return cls(
            encoder,
            special_tokens=special,
            eos_ids=read_generation_config(directory).eos_token_ids,
            prefix=_affix(encoder, special.get("bos_token")) if begin else (),
            suffix=_affix(encoder, special.get("eos_token")) if end else (),
            own_affixes=begin is not None,
            chat_template=read_templates(directory).get("default"),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens spelled out in it become their ids.

        add_special_tokens: adds BOS or EOS where the model wants them (not for text that a chat template
        made). Raises RequestError for text that is not Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as cause:
            raise RequestError(
                f"the text has a lone surrogate ({text[cause.start]!r}) at position {cause.start}; "
                "pass valid Unicode"
            ) from None
        ids = self._encoder.encode(text, add_special_tokens and not self._own_affixes)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing.

        Raises RequestError for a negative id.
        """
        kept = (token for token in ids if not (skip_special_tokens and token in self.special_ids))
        data = b"".join(map(self.token_bytes, kept))
        if self.drops_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token adds to a text (may be part of a character); b"" outside the vocabulary.

        Raises RequestError for a negative id.
        """
        found = self._bytes.get(token)
        if found is None:
            found = self._spell(token)
            if found:  # ids outside the vocabulary come from clients and must not fill the cache
                self._bytes[token] = found
        return found

    def token_text(self, token: int) -> str:
        """Text of one token by itself, its leading space kept; U+FFFD for a part of a character."""
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def id_of(self, piece: str) -> int | None:
        """Id of a token as the vocabulary spells it ("<|im_end|>", "Ġthe"), or None."""
        return self._encoder.id_of(piece)

    def to_json(self) -> dict[str, Any] | None:
        """The tokenizer as tokenizer.json has it, added tokens included; None of a tokenizer.model."""
        return self._encoder.to_json()

    def pieces(self) -> list[tuple[str, float, int]]:
        """Text, score and SentencePiece's type (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6
        byte) of every token of a tokenizer.model; empty of others."""
        return self._encoder.pieces()

    def _spell(self, token: int) -> bytes:
        if token < 0:
            raise RequestError(f"token id {token} is negative; ids are 0..{self.vocab_size - 1}")
        added = self._added.get(token)
        piece = self._encoder.piece(token) if token < 2**31 else None
        if added is not None and self._encoder.alphabet == "byte-level":
            # Added tokens are matched in raw text and never spelled in the byte alphabet.
            return added.content.encode()
        return b"" if piece is None else piece_bytes(piece, self._encoder.alphabet)

    def _named(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return self._encoder.id_of(text) if isinstance(text, str) else None


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory has files of one."""
    return any((directory / name).is_file() for name in _FILES)


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path, error=TokenizerError) if path.is_file() else {}


def _affix(encoder: Encoder, text: str | list[str] | None) -> tuple[int, ...]:
    token = encoder.id_of(text) if isinstance(text, str) else None
    return () if token is None else (token,)


def _special_tokens(directory: Path, config: Mapping[str, Any], family: Family) -> dict[str, str | list[str]]:
    """Names of special tokens -> text. Later sources win: the family's defaults, the config, the map."""
    found: dict[str, str | list[str]] = dict(family.tokens)
    # As in transformers, the map is a legacy file that counts only without added_tokens_decoder.
    legacy = {} if "added_tokens_decoder" in config else _optional(directory / "special_tokens_map.json")
    for source in (config, legacy):
        for name in SPECIAL_NAMES & source.keys():
            value = source[name]
            if value is None:
                found.pop(name, None)
            elif name == "additional_special_tokens":
                found[name] = [_content(directory, name, item) for item in _list(directory, name, value)]
            else:
                found[name] = _content(directory, name, value)
    return found


def _list(directory: Path, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TokenizerError(f"{directory}: {name} is {value!r}; a list of tokens is needed")
    return value


def _content(directory: Path, name: str, value: Any) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise TokenizerError(
            f"{directory}: {name} is {value!r}; a token's text (or an object with `content`) is needed"
        )
    return text


def _texts(special: Mapping[str, str | list[str]]) -> list[str]:
    return [text for value in special.values() for text in ([value] if isinstance(value, str) else value)]


def _added_tokens(
    directory: Path, config: Mapping[str, Any], special: Mapping[str, str | list[str]]
) -> dict[int, AddedToken]:
    """Tokens that tokenizer_config.json (or the legacy added_tokens.json) adds, by id."""
    texts = _texts(special)
    listed = config.get("added_tokens_decoder")
    try:
        if listed is not None:
            made = {int(token): AddedToken.parse(entry) for token, entry in listed.items()}
        else:
            plain = _optional(directory / "added_tokens.json")
            made = {
                int(token): AddedToken(text, normalized=text not in texts) for text, token in plain.items()
            }
    except (AttributeError, TypeError, ValueError) as cause:
        raise TokenizerError(f"{directory}: the added tokens cannot be read ({cause})") from None
    return {
        token: made[token].as_special() if made[token].content in texts else made[token]
        for token in sorted(made)
    }


def _open(
    directory: Path,
    config: Mapping[str, Any],
    family: Family,
    added: Mapping[int, AddedToken],
    special: Mapping[str, str | list[str]],
) -> tuple[Encoder, bool]:
    """The first vocabulary there is, and whether it is a tokenizer.json (which has its own affixes)."""
    if (directory / "tokenizer.json").is_file():
        from gossamer.checkpoint.tokenizer_hf import HfEncoder

        return HfEncoder.load(directory / "tokenizer.json", config, added, _texts(special)), True
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        from gossamer.checkpoint.tokenizer_hf import HfEncoder

        return HfEncoder.build(directory, config, family, added), False
    if (directory / "tokenizer.model").is_file():
        from gossamer.checkpoint.tokenizer_spm import SentencePieceEncoder

        return SentencePieceEncoder(directory / "tokenizer.model", config, added), False
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; pass a model directory")
    raise TokenizerError(
        f"no tokenizer in {directory}: looked for tokenizer.json, vocab.json with merges.txt, and "
        "tokenizer.model; copy the one of the original model there"
    )
