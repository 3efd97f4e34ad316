"""What an ablation is asked for, and what it tells whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gossamer.bench.ablation.shapes import check_shape
from gossamer.bench.ledger import Mode, Row
from gossamer.errors import ConfigError
from gossamer.quality.windows import Text
from gossamer.techniques import card

__all__ = ["MODES", "Now", "Request", "Watch"]

MODES: tuple[Mode, ...] = ("alone", "cumulative", "without")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be measured. techniques: () is all; seconds: of the whole run (None: no end); arm_seconds:
    most of one arm's rounds; tokens: of text that quality is measured on; make: whether to
    distil and prune the model where no result of that is shipped, with a part of the texts."""

    model: str
    techniques: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = MODES
    speed_shape: str = "135m"
    texts: tuple[Text, ...] = ()
    rounds: int = 10
    seconds: float | None = None
    arm_seconds: float = 60.0
    tokens: int = 8192
    make: bool = False

    def __post_init__(self) -> None:
        check_shape(self.speed_shape)
        for name in self.techniques:
            card(name)
        for mode in self.modes:
            if mode not in MODES:
                raise ConfigError(f"mode {mode!r} is unknown; choose {', '.join(MODES)}")
        if self.make and not self.texts:
            raise ConfigError(
                "models are pruned and distilled with text; name some with --text (the more the better), or "
                "leave out --full"
            )
        if self.rounds < 2:
            raise ConfigError(
                f"rounds {self.rounds} must be at least 2: one says nothing of how much it varies"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """What is going on. medians: speed metric -> (off, on) so far."""

    technique: str
    mode: str
    what: str
    done: int
    arms: int
    medians: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What a front end wants to hear."""

    now: Callable[[Now], None] = field(default=lambda now: None)
    row: Callable[[Row], None] = field(default=lambda row: None)
