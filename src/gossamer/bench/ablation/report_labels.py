"""Where labels of a drawing can stand so that none lies on another, on a dot or on a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Box", "place_labels"]

_AWAY = (9, 18, 30, 44, 60, 80, 104)  # how far a label may be from its dot, nearest first
_SIDES = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: Box) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def within(self, other: Box) -> bool:
        return (
            other.x <= self.x
            and other.y <= self.y
            and self.x + self.width <= other.x + other.width
            and self.y + self.height <= other.y + other.height
        )


def place_labels(
    spots: Sequence[tuple[float, float]],
    widths: Sequence[float],
    height: float,
    order: Sequence[int],
    frame: Box,
    lines: Sequence[Box] = (),
) -> dict[int, Box]:
    """Index -> where its label stands: clear of every dot, of `lines` and of the labels before it in `order`,
    within the frame. One for which there is no such place near its dot is left out."""
    taken = [*lines, *(Box(x - 6, y - 6, 12, 12) for x, y in spots)]
    placed: dict[int, Box] = {}
    for i in order:
        for box in _candidates(spots[i], widths[i], height):
            if box.within(frame) and not any(box.meets(other) for other in taken):
                placed[i] = box
                taken.append(box)
                break
    return placed


def _candidates(spot: tuple[float, float], width: float, height: float) -> Iterator[Box]:
    """Places around a dot, in rings."""
    x, y = spot
    for away in _AWAY:
        for dx, dy in _SIDES:
            slant = 0.75 if dx and dy else 1.0
            middle_x = x + dx * (slant * away + width / 2)
            middle_y = y + dy * (slant * away + height / 2)
            yield Box(middle_x - width / 2, middle_y - height / 2, width, height)
