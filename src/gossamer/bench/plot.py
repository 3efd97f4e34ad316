"""A replay as a picture: sequences running and waiting, pages held, and tokens in each step over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.bench.throughput import Outcome
from gossamer.errors import ConfigError, DependencyError

__all__ = ["check_picture", "draw"]

_RUNNING, _WAITING, _HELD, _FILLED, _TOKENS, _PREEMPTED = (
    "#2563a8", "#e0a458", "#9db8d2", "#2f7f79", "#6b5b95", "#c0392b",
)  # fmt: skip
_FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Raises ConfigError for a file that is no picture or has no place, DependencyError without matplotlib:
    before anything is measured."""
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"--plot {path} is no picture; let it end in {', '.join(_FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: the folder {path.parent} does not exist; make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            "--plot needs matplotlib; install it with: pip install 'gossamer[plots]'"
        ) from error


def draw(outcomes: Mapping[str, Outcome], title: str, path: Path) -> None:
    """Writes the picture: a column for each way to serve, on the same scales."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"fontsize": 9, "color": "#444444"}
    figure = Figure(figsize=(4.6 + 4.2 * (len(outcomes) - 1) + 3.4, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(3, len(outcomes), sharex=True, sharey="row", squeeze=False)
    for column, (name, outcome) in enumerate(outcomes.items()):
        panels = grid[:, column]
        _sequences(panels[0], outcome)
        _pages(panels[1], outcome)
        _tokens(panels[2], outcome)
        panels[0].set_title(f"{name}\n" if len(outcomes) > 1 else "", fontsize=11, loc="left")
        panels[0].text(
            0.0, 1.03, _summary(outcome), transform=panels[0].transAxes, fontsize=8, color="#666666"
        )
        panels[2].set_xlabel("seconds", **style)
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", color="#e6e6e6", linewidth=0.7)
            panel.set_axisbelow(True)
            panel.tick_params(labelsize=8, color="#999999")
            panel.set_ylim(bottom=0)
            panel.set_xlim(0, 1.01 * max(outcome.seconds for outcome in outcomes.values()))
    for panel, label in zip(grid[:, 0], ("sequences", "% of KV pages", "tokens in a step"), strict=True):
        panel.set_ylabel(label, **style)
    for panel in grid[:, -1]:
        panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"cannot write the picture {path}: {error.strerror}") from None


def _summary(outcome: Outcome) -> str:
    tokens = sum(map(len, outcome.tokens)) / outcome.seconds
    marks = f", {outcome.preemptions} preemptions" if outcome.preemptions else ""
    return f"{outcome.seconds:.1f} s, {tokens:.0f} output tok/s{marks}"


def _steps(outcome: Outcome) -> tuple[list[float], list[int]]:
    """Edges of a staircase over the steps, and which step each tread shows (-1: nothing ran)."""
    edges, treads = [0.0], []
    pause = outcome.seconds / 200  # less than that is the time between two steps
    for index, point in enumerate(outcome.points):
        began = max(point.at - point.seconds, edges[-1])
        if began - edges[-1] > pause:
            edges.append(began)
            treads.append(-1)
        edges.append(max(point.at, edges[-1]))
        treads.append(index)
    return edges, treads


def _stairs(panel: Any, outcome: Outcome, values: list[float], **options: Any) -> None:
    edges, treads = _steps(outcome)
    panel.stairs([values[t] if t >= 0 else 0.0 for t in treads], edges, **options)


def _sequences(panel: Any, outcome: Outcome) -> None:
    running = [float(p.running) for p in outcome.points]
    both = [float(p.running + p.waiting) for p in outcome.points]
    _stairs(panel, outcome, both, fill=True, color=_WAITING, alpha=0.55, label="waiting")
    _stairs(panel, outcome, running, fill=True, color=_RUNNING, label="running")
    marks = [p.at - p.seconds for p in outcome.points if p.preempted]
    if marks:
        top = [p.running for p in outcome.points if p.preempted]
        panel.plot(marks, top, "v", color=_PREEMPTED, markersize=5, clip_on=False, label="preemption")


def _pages(panel: Any, outcome: Outcome) -> None:
    held = [100 * p.held for p in outcome.points]
    filled = [100 * p.held * p.filled for p in outcome.points]
    _stairs(panel, outcome, held, fill=True, color=_HELD, label="held")
    _stairs(panel, outcome, filled, fill=True, color=_FILLED, label="with keys\nand values")
    panel.axhline(100, color="#999999", linewidth=0.7, linestyle=":")


def _tokens(panel: Any, outcome: Outcome) -> None:
    tokens = [float(p.tokens) for p in outcome.points]
    _stairs(panel, outcome, tokens, fill=True, color=_TOKENS, alpha=0.85, label="computed")
