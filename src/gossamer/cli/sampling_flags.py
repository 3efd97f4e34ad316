"""How tokens are chosen: the flags of generate and chat."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from gossamer.cli.options import flag
from gossamer.errors import ConfigError

__all__ = ["SamplingFlags"]

_PANEL = "Sampling"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFlags:
    """None means: as the model's generation_config.json advises, else the default of SamplingParams."""

    # fmt: off
    temperature: Annotated[float | None, flag(
        "--temperature", panel=_PANEL,
        help="0 is greedy; if not given, what the model advises, else 1.")] = None
    top_p: Annotated[float | None, flag(
        "--top-p", panel=_PANEL, help="Keep the likeliest tokens up to this probability.")] = None
    top_k: Annotated[int | None, flag("--top-k", panel=_PANEL, help="Keep the k likeliest tokens.")] = None
    min_p: Annotated[float | None, flag(
        "--min-p", panel=_PANEL, help="Drop tokens below this part of the likeliest.")] = None
    seed: Annotated[int | None, flag("--seed", panel=_PANEL, help="Makes sampling repeatable.")] = None
    stop: Annotated[list[str] | None, flag(
        "--stop", panel=_PANEL, metavar="TEXT", help="End before this text. Repeatable.")] = None
    ignore_eos: Annotated[bool, flag("--ignore-eos", panel=_PANEL, help="Go on past the end token.")] = False
    min_tokens: Annotated[int | None, flag(
        "--min-tokens", panel=_PANEL, help="No end before so many tokens.")] = None
    repetition_penalty: Annotated[float | None, flag(
        "--repetition-penalty", panel=_PANEL, help="Above 1: repeat less.")] = None
    presence_penalty: Annotated[float | None, flag(
        "--presence-penalty", panel=_PANEL, help="Against tokens that are there already.")] = None
    frequency_penalty: Annotated[float | None, flag(
        "--frequency-penalty", panel=_PANEL, help="The same, by how often.")] = None
    json_schema: Annotated[str | None, flag(
        "--json-schema", panel=_PANEL, metavar="FILE|TEXT",
        help="The output is JSON that conforms to this schema; {} for any.")] = None
    regex: Annotated[str | None, flag(
        "--regex", panel=_PANEL, metavar="TEXT",
        help="The output matches this expression from its beginning to its end.")] = None
    grammar: Annotated[str | None, flag(
        "--grammar", panel=_PANEL, metavar="FILE|TEXT",
        help="The output follows this grammar (Lark's syntax, beginning at `start`).")] = None
    choice: Annotated[list[str] | None, flag(
        "--choice", panel=_PANEL, metavar="TEXT", help="The output is one of these. Repeatable.")] = None
    # fmt: on

    def given(self) -> dict[str, Any]:
        """What was said, as arguments of SamplingParams."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        wanted = {key: said.pop(name) for name, key in _STRUCTURED.items() if name in said}
        for key in wanted.keys() & {"json", "grammar"}:
            wanted[key] = _text(wanted[key])
        if wanted:
            said["structured_outputs"] = wanted
        return said | {"stop": tuple(self.stop or ())}


_STRUCTURED = {"json_schema": "json", "regex": "regex", "grammar": "grammar", "choice": "choice"}


def _text(given: str) -> str:
    """The text itself or the file that it names. Raises ConfigError for a file that cannot be read."""
    if any(mark in given for mark in "{:\n"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read {given[:200]} ({why}); give a file or the text itself") from None
