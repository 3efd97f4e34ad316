"""tokenizer.model through the `sentencepiece` library, with special tokens split off first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.checkpoint.token_pieces import Alphabet
from gossamer.checkpoint.tokenizer_family import AddedToken
from gossamer.errors import DependencyError, TokenizerError

__all__ = ["SentencePieceEncoder"]

# Protobuf merges what is appended; this says normalizer_spec.add_dummy_prefix = false and
# normalizer_spec.remove_extra_whitespaces = false.
_NO_PREFIX = b"\x1a\x04\x18\x00\x20\x00"


class SentencePieceEncoder:
    """A SentencePiece model as `gossamer.checkpoint.tokenizer.Encoder`.

    Text is cut at special tokens, as transformers does. tokenizer_config.json's `legacy: false` (Llama)
    gives the space in front that SentencePiece adds to the first piece of text only.
    Raises DependencyError without the library, TokenizerError for a file it cannot read.
    """

    alphabet: Alphabet = "sentencepiece"

    def __init__(self, path: Path, config: Mapping[str, Any], added: Mapping[int, AddedToken]) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise DependencyError(
                f"{path} needs the sentencepiece library: pip install 'gossamer[sentencepiece]'"
            ) from None
        try:
            data = path.read_bytes()
            self._first, self._later = SentencePieceProcessor(), SentencePieceProcessor()
            self._first.LoadFromSerializedProto(data)
            self._later.LoadFromSerializedProto(data + _NO_PREFIX)
        except (OSError, RuntimeError) as cause:
            raise TokenizerError(
                f"{path} is not a SentencePiece model ({cause}); download the file again"
            ) from None
        if config.get("legacy", True) is not False:
            self._later = self._first
        self._pieces = self._first.get_piece_size()
        self._added = self._markers() | dict(added)
        self._ids = {each.content: token for token, each in self._added.items()}
        self.size = max(self._pieces - 1, *self._added) + 1
        self.drops_space = str(self._first.normalize("a")).startswith("▁")
        # The longest first, so that a marker that begins another one does not hide it.
        self._order = sorted(self._added.items(), key=lambda item: -len(item[1].content))
        self._split = re.compile("|".join(_pattern(each) for _, each in self._order))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text. add_special_tokens changes nothing: the file has no post-processor."""
        ids: list[int] = []
        at = 0
        for match in self._split.finditer(text):
            ids += self._plain(text[at : match.start()], at)
            ids.append(self._order[(match.lastindex or 1) - 1][0])
            at = match.end()
        return ids + self._plain(text[at:], at)

    def piece(self, token: int) -> str | None:
        """Spelling of a token in the vocabulary."""
        if token in self._added:
            return self._added[token].content
        return str(self._first.id_to_piece(token)) if token < self._pieces else None

    def id_of(self, piece: str) -> int | None:
        """Id of a spelling."""
        token = self._ids.get(piece, self._first.piece_to_id(piece))
        return None if token == self._first.unk_id() and self.piece(token) != piece else int(token)

    def added(self) -> Mapping[int, AddedToken]:
        """Tokens matched in raw text, by id."""
        return self._added

    def to_json(self) -> None:
        """There is none."""

    def pieces(self) -> list[tuple[str, float, int]]:
        """Text, score and type of every token, as in the file; added ones behind."""
        model = self._first
        found = [
            (str(model.id_to_piece(i)), float(model.get_score(i)), self._kind(i)) for i in range(self._pieces)
        ]
        for token in range(self._pieces, self.size):
            added = self._added.get(token)
            kind = 5 if added is None else 3 if added.special else 4
            found.append((f"[PAD{token}]" if added is None else added.content, -1000.0, kind))
        return found

    def _kind(self, token: int) -> int:
        model = self._first
        tests = ((model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6))
        kind = next((kind for test, kind in tests if test(token)), 1)
        added = self._added.get(token)
        return kind if added is None or kind != 1 else 3 if added.special else 4

    def _plain(self, text: str, at: int) -> list[int]:
        return list((self._later if at else self._first).encode(text)) if text else []

    def _markers(self) -> dict[int, AddedToken]:
        """<s>, </s>, <unk> and the like, which SentencePiece never finds in a text by itself."""
        model = self._first
        return {
            token: AddedToken(model.id_to_piece(token), special=True, normalized=False)
            for token in range(self._pieces)
            if model.is_control(token) or model.is_unknown(token)
        }


def _pattern(token: AddedToken) -> str:
    before, after = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
    return f"{before}({re.escape(token.content)}){after}"
