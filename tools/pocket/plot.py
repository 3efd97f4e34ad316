"""The loss curve as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def loss_curve(path: Path, train: list[tuple[int, float]], valid: list[tuple[int, float]]) -> None:
    """Writes training loss (smoothed over about 1% of the run) and validation loss over tokens seen."""
    figure, axes = plt.subplots(figsize=(7, 4))
    width = max(1, len(train) // 100)
    smooth = [
        (train[i + width - 1][0] / 1e6, sum(loss for _, loss in train[i : i + width]) / width)
        for i in range(0, len(train) - width + 1, width)
    ]
    axes.plot(*zip(*smooth), label="training")
    if valid:
        axes.plot([tokens / 1e6 for tokens, _ in valid], [loss for _, loss in valid], label="validation")
    axes.set_xlabel("million tokens seen")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(top=min(axes.get_ylim()[1], 7.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    plt.close(figure)
