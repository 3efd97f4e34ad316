"""The course of the losses: as a picture where matplotlib is installed, and as numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

__all__ = ["write_losses"]

_NAMES = {
    "loss": "loss", "ce": "cross entropy on the text", "forward_kl": "KL to the teacher",
    "reverse_kl": "reverse KL to the teacher", "js": "JS to the teacher",
    "hidden": "distance of hidden states", "attention": "distance of attention",
}  # fmt: skip


def write_losses(directory: Path, losses: Mapping[str, Sequence[float]], tokens: int) -> None:
    """losses.json (every step) and loss.png (means over about a hundredth of the run). tokens: of a step."""
    values = {name: [round(x, 6) for x in series] for name, series in losses.items()}
    (directory / "losses.json").write_text(json.dumps({"tokens_per_step": tokens, **values}) + "\n")
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    shown = {name: series for name, series in losses.items() if not _same(name, losses)}
    for name, series in shown.items():
        width = max(1, len(series) // 100)
        count = len(series) // width
        means = np.array(series[: count * width]).reshape(count, width).mean(1)
        axes.plot((np.arange(count) + 1) * width * tokens / 1e6, means, label=_NAMES.get(name, name))
    axes.set_xlabel("million tokens seen")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(directory / "loss.png", dpi=110, metadata={"Software": ""})
    pyplot.close(figure)


def _same(name: str, losses: Mapping[str, Sequence[float]]) -> bool:
    """Whether a series is the whole loss, which is shown under its own name then."""
    return name == "loss" and any(
        np.allclose(series, losses["loss"], rtol=1e-5) for other, series in losses.items() if other != "loss"
    )
