"""Texts as windows of tokens, so that every token is predicted once with enough before it.

Of a text's tokens windows of at most `context` begin `stride` apart; the first predicts all of its tokens
that have one before them, a later one the last `stride`, each with at least context - stride before it (as
transformers' page on the perplexity of fixed-length models does). Where the tokenizer begins texts with a
token, every window begins with it, and it takes a place.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.errors import ConfigError

__all__ = ["Document", "Text", "Window", "fair_shares", "first_windows", "read_documents", "read_texts",
           "tokens_hash", "windows_of"]  # fmt: skip

Ids = npt.NDArray[np.int32]
_CHARACTERS = 24  # no ordinary text has more of them per token


@dataclass(frozen=True, slots=True)
class Text:
    """A text and what to call it."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens of a text's beginning, without a begin token; bytes: of the text's UTF-8 that each one stands
    for, those that the tokenizer drops (surplus spaces, perhaps) shared out among all."""

    name: str
    ids: Ids
    bytes: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Window:
    """ids [L] are computed; the last len(targets) of them predict `targets`. document: which it is of."""

    ids: Ids
    targets: Ids
    document: int = 0


def read_texts(files: Iterable[Path]) -> list[Text]:
    """Files of UTF-8 text, plain or .xz. Raises ConfigError for one that cannot be read or is empty."""
    texts = []
    for path in files:
        try:
            with (
                lzma.open(path, "rt", encoding="utf-8")
                if path.suffix == ".xz"
                else path.open(encoding="utf-8") as file
            ):
                text = file.read()
        except OSError as error:
            raise ConfigError(f"cannot read the text {path}: {error.strerror or error}") from None
        except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
            raise ConfigError(f"the text {path} is not UTF-8, plain or .xz: {error}") from None
        if not text.strip():
            raise ConfigError(f"the text {path} is empty; leave it out")
        texts.append(Text(path.name, text))
    return texts


def read_documents(
    texts: Sequence[Text], tokenizer: Tokenizer, *, bos: int | None = None, most: int | None = None
) -> list[Document]:
    """The texts' tokens, of which `most` in all are to be predicted: shared out fairly, from the beginnings.

    bos: the token that windows begin with, if they do; without it a text's first token is not predicted.
    Raises ConfigError where a text has fewer than two tokens.
    """
    free = 0 if bos is not None else 1
    found = []
    for text in texts:
        document = _read(text, tokenizer, None if most is None else most + free)
        count = len(document.ids)
        if count < 2:
            raise ConfigError(f"the text {text.name} is of {count} tokens; two at least can be measured")
        found.append(document)
    if most is None:
        return found
    shares = fair_shares([len(d.ids) - free for d in found], most)
    return [
        replace(d, ids=d.ids[: share + free], bytes=d.bytes[: share + free])
        for d, share in zip(found, shares, strict=True)
    ]


def fair_shares(sizes: Sequence[int], most: int) -> list[int]:
    """`most` shared out evenly over things of these sizes: what one cannot take the others do.

    Raises ConfigError where not every one would get something.
    """
    if most < len(sizes):
        raise ConfigError(f"{most} tokens of {len(sizes)} texts are to be measured; raise --max-tokens")
    shares = [0] * len(sizes)
    left = min(most, sum(sizes))
    for rank, index in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        shares[index] = min(sizes[index], left // (len(sizes) - rank))
        left -= shares[index]
    return shares


def windows_of(document: Document, index: int, context: int, stride: int, bos: int | None) -> list[Window]:
    """The windows of a document, which is the index-th. Raises ConfigError for a stride outside of 1 ...
    context - 1."""
    head = [] if bos is None else [bos]
    room = context - len(head)
    if context < 2 or not 1 <= stride < context:
        raise ConfigError(
            f"windows of {context} tokens cannot move by {stride}; a context of at least 2 and a stride "
            f"from 1 to {max(context - 1, 1)} are right"
        )
    ids = document.ids
    out: list[Window] = []
    done = 0 if head else 1  # tokens predicted so far, or that cannot be
    while done < len(ids):
        reach = done + stride if out else room
        begin, end = reach - room, min(len(ids), reach)
        inputs = np.asarray([*head, *ids[begin : end - 1]], np.int32)
        out.append(Window(inputs, ids[done:end], index))
        done = end
    return out


def first_windows(windows: Sequence[Window], tokens: int) -> list[Window]:
    """Windows that predict about so many tokens, spread evenly over all (at least one)."""
    total = sum(len(window.targets) for window in windows)
    count = min(len(windows), max(1, round(len(windows) * tokens / max(total, 1))))
    return [windows[i * len(windows) // count] for i in range(count)]


def tokens_hash(documents: Iterable[Document]) -> str:
    """SHA-256 of the documents' tokens, as little-endian 32-bit integers, each document behind its length."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(np.asarray([len(document.ids), *document.ids], "<i4").tobytes())
    return digest.hexdigest()


def _read(text: Text, tokenizer: Tokenizer, most: int | None) -> Document:
    """The text's tokens, at most `most`, without reading far beyond them."""
    piece = text.text if most is None else text.text[: (most + 1) * _CHARACTERS]
    ids = tokenizer.encode(piece, add_special_tokens=False)
    if len(piece) < len(text.text) and most is not None and len(ids) <= most:
        piece, ids = text.text, tokenizer.encode(text.text, add_special_tokens=False)
    known, inverse = np.unique(np.asarray(ids, np.int32), return_inverse=True)
    sizes = np.asarray([len(tokenizer.token_bytes(token)) for token in known.tolist()], np.float64)[inverse]
    if ids and tokenizer.drops_space and tokenizer.token_bytes(ids[0]).startswith(b" "):
        sizes[0] -= 1
    sizes *= len(piece.encode()) / max(float(sizes.sum()), 1.0)
    return Document(text.name, np.asarray(ids[:most], np.int32), sizes[:most])
