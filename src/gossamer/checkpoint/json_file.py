"""JSON files of a checkpoint, read as if an attacker had written them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from gossamer.errors import CheckpointError

__all__ = ["parse_json_object", "read_json_object", "read_text"]

MAX_BYTES = 64 << 20
RENEW = "download the file again"


def read_text(
    path: Path, *, cap: int = MAX_BYTES, error: type[CheckpointError] = CheckpointError, renew: str = RENEW
) -> str:
    """Text of a UTF-8 file of at most `cap` bytes. renew: what would help where it is damaged.

    Raises `error` when the file is missing, unreadable, larger than `cap` or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(cap + 1)
    except OSError as cause:
        reason = cause.strerror or cause
        raise error(f"cannot read {path}: {reason}; check the path or {renew}") from None
    if len(data) > cap:
        raise error(
            f"{path} is larger than the {cap} bytes allowed for it; it is damaged or not what it says"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(
            f"{path} is not UTF-8 text (byte {cause.start} is {data[cause.start]:#04x}); {renew}"
        ) from None


def read_json_object(
    path: Path, *, cap: int = MAX_BYTES, error: type[CheckpointError] = CheckpointError, renew: str = RENEW
) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `error` as `read_text` and `parse_json_object` do."""
    text = read_text(path, cap=cap, error=error, renew=renew)
    return parse_json_object(text, str(path), error=error, renew=renew)


def parse_json_object(
    text: str, source: str, *, error: type[CheckpointError] = CheckpointError, renew: str = RENEW
) -> dict[str, Any]:
    """The object written in `text`; `source` names it in messages.

    Raises `error` for invalid JSON, a key given twice (readers disagree on which one counts), nesting
    too deep to parse, or a top level that is not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise error(f"{source}: the key {twice!r} is given twice; {renew}")
        return made

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise error(f"{source}: JSON nested too deeply to be what it says; {renew}") from None
    except ValueError as cause:
        raise error(f"{source} is not valid JSON ({cause}); {renew}") from None
    if not isinstance(value, dict):
        raise error(f"{source} holds a JSON {type(value).__name__}; an object {{...}} is needed")
    return value
