"""Small models of every family on disk, and jobs that prune them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.backends.reference import ReferenceModel, export_tensors
from gossamer.checkpoint.model_writer import write_config, write_weights
from gossamer.checkpoint.weights import DummySource
from gossamer.compress.model import open_model
from gossamer.compress.step import Job, Stopped
from gossamer.graph.families import build_graph
from tests.compress.test_blocks import architecture
from tests.families.configs import CASES

TEXT = np.random.default_rng(1).integers(0, 101, 600).astype(np.int32)


def save(
    case: str,
    directory: Path,
    change: Callable[[ReferenceModel], None] = lambda model: None,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Path:
    """A random model of a family, changed on its graph's weights. fields: of config.json."""
    config = CASES[case].config()
    raw = {**config.to_dict(), "architectures": [architecture(config)], **fields}
    raw = {key: value for key, value in raw.items() if value is not None or key == "sliding_window"}
    graph = build_graph(raw)
    model = ReferenceModel.load(graph, DummySource(graph))
    with torch.no_grad():
        change(model)
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, export_tensors(model.to(dtype)))
    write_config(directory, {**raw, "torch_dtype": str(dtype).removeprefix("torch.")})
    return directory


def job(model: Path, at: Path, *, stop_after: int | None = None, text: Any = TEXT, **fields: Any) -> Job:
    """A step on a model, in directories under `at`. stop_after: checks until it is asked to stop."""
    for name in ("out", "scratch"):
        (at / name).mkdir(parents=True, exist_ok=True)
    checks = 0

    def stopping() -> bool:
        nonlocal checks
        checks += 1
        return stop_after is not None and checks > stop_after

    return Job(
        **{
            "model": model, "original": model, "out": at / "out", "scratch": at / "scratch", "text": text,
            "context": 20, "samples": 12, "seed": 0, "threads": 1, "stopping": stopping, **fields,
        }
    )  # fmt: skip


def interrupted(run: Callable[[Job], object], model: Path, at: Path, every: int) -> None:
    """Runs a step, stopped after so many checks, then after one more and so on, to its end."""
    stops = 0
    while True:
        try:
            run(job(model, at, stop_after=every + stops))
            break
        except Stopped:
            stops += 1
            assert stops < 50
    assert stops > 1


def logits(directory: Path) -> torch.Tensor:
    """Of some tokens, as the reference computes them."""
    graph, source = open_model(directory)
    ids = torch.from_numpy(TEXT[:36].astype(np.int64)).view(2, 18)
    with torch.inference_mode():
        return ReferenceModel.load(graph, source).logits(ids)
