"""How tokens are chosen: the flags of generate and chat."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from gossamer.cli.options import flag

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
    # fmt: on

    def given(self) -> dict[str, Any]:
        """What was said, as arguments of SamplingParams."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return said | {"stop": tuple(self.stop or ())}
