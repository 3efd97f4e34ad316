"""Which bytes a token stands for. Text is the UTF-8 decoding of these bytes, whole or as they come.

Two alphabets cover the decoder models: byte-level BPE writes every byte as a printable character
(GPT-2, https://github.com/openai/gpt-2/blob/master/src/encoder.py), SentencePiece writes spaces as
U+2581 and bytes outside of its vocabulary as <0xHH>.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from gossamer.errors import TokenizerError

__all__ = ["Alphabet", "alphabet_of", "piece_bytes"]

Alphabet = Literal["byte-level", "sentencepiece"]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_bytes(piece: str, alphabet: Alphabet) -> bytes:
    """Bytes of a vocabulary entry as the model's file spells it."""
    if alphabet == "byte-level":
        table = _byte_of_character()
        try:
            return bytes(table[character] for character in piece)
        except KeyError:
            return piece.encode()
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def alphabet_of(decoder: Mapping[str, Any], source: str) -> tuple[Alphabet, bool]:
    """Alphabet of a tokenizer.json "decoder", and whether decoding drops one leading space.

    Raises TokenizerError for a decoder that is neither byte-level nor SentencePiece's.
    """
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = {part.get("type") for part in parts}
    if kinds == {"ByteLevel"}:
        return "byte-level", False
    if kinds == {"Metaspace"} and decoder.get("replacement") == "▁":
        return "sentencepiece", decoder.get("prepend_scheme") != "never"
    strips = [part for part in parts if part.get("type") == "Strip"]
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    if spaces in parts and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        drop = [part for part in strips if (part.get("content"), part.get("start")) == (" ", 1)]
        if strips == drop and len(parts) - len(strips) - len(kinds & {"ByteFallback", "Fuse"}) == 1:
            return "sentencepiece", bool(drop)
    raise TokenizerError(
        f"{source}: the decoder {sorted(str(kind) for kind in kinds)} is not supported; supported are "
        "ByteLevel, Metaspace and SentencePiece's Replace + ByteFallback + Fuse + Strip"
    )


@cache
def _byte_of_character() -> Mapping[str, int]:
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + n): byte for n, byte in enumerate(hidden)}
