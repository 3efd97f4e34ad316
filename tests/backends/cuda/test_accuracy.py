"""The embedded model in bf16 on held-out text, beside the float32 reference."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.backends.cuda.device import interpreted, open_device
from gossamer.backends.cuda.kernels import linear_float
from gossamer.backends.cuda.program import CudaProgram
from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.config import EngineConfig, MixedPrecision
from gossamer.engine.step import Span, StepPlan
from gossamer.runtime.local import LocalExecutor
from gossamer.runtime.planning import passed, step_shape
from gossamer.runtime.sizing import plan_kv
from gossamer.runtime.start import load_graph

BOOK = "franz-kafka-metamorphosis.txt"
ERROR = 1e-2  # the greatest difference of two logits, as a part of the greatest logit
AGREED = 0.99


@pytest.fixture(autouse=True)
def _as_hardware_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 to bfloat16 where hardware rounds, which doubles the error and gives it a
    direction. And its programs of GEMVs are few here: each costs it the same."""
    if not interpreted():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        bits = np.ascontiguousarray(x).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).reshape(x.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(linear_float, "gemv_columns", lambda columns: 64)


def compared(shared: Path, tokens: int, window: int, chunk: int, decoded: int) -> tuple[float, float]:
    """Of windows of a held-out book, each in chunks and its last `decoded` tokens one by one: the greatest
    difference, as a part of the greatest logit, and how often the likeliest token is the same."""
    book = shared / "data" / "books" / "held-out" / BOOK
    if not book.exists():
        pytest.skip(f"no {BOOK} among the held-out books of ../shared")
    config = EngineConfig(
        model="gossamer/pocket", backend="cuda", mixed_precision=MixedPrecision(), max_model_len=window,
        max_num_seqs=chunk, max_num_batched_tokens=chunk,
    )  # fmt: skip
    graph, directory, source = load_graph(config)
    after, _ = passed(graph, config)
    kv = plan_kv(after, config, 1 << 28)
    shape = step_shape(after, config, kv)
    program = CudaProgram(after, source, shape, open_device(), recorded=not interpreted())
    executor = LocalExecutor(program, kv.max_model_len)
    reference = ReferenceModel.load(graph, source)
    ids = Tokenizer.load(directory).encode(book.read_text()[2000 : 2000 + 8 * tokens])
    table = tuple(range(-(-window // kv.page_size)))
    errors, greatest, agreed = [], [], []
    for begin in range(0, tokens, window):
        part = list(ids[begin : begin + window])
        cuts = [*range(0, window - decoded, chunk), *range(window - decoded, window + 1)]
        found = []
        for start, stop in pairwise(cuts):
            rows = range(stop - start)
            span = Span(0, part[start:stop], start, rows, (table,) * len(graph.kv_groups))
            found.append(executor.logits(StepPlan((span,))).copy())
        with torch.inference_mode():
            exact = reference.logits(torch.tensor([part]))[0].numpy()
        logits = np.concatenate(found)
        errors.append(float(np.abs(logits - exact).max()))
        greatest.append(float(np.abs(exact).max()))
        agreed.append(logits.argmax(1) == exact.argmax(1))
    return max(errors) / max(greatest), float(np.concatenate(agreed).mean())


@pytest.mark.slow
def test_a_few_tokens(shared: Path) -> None:
    error, agreed = compared(shared, tokens=50, window=50, chunk=48, decoded=2)
    assert error <= ERROR and agreed >= AGREED, (error, agreed)


@pytest.mark.gpu
def test_held_out_text(shared: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    error, agreed = compared(shared, tokens=8192, window=512, chunk=256, decoded=16)
    assert error <= ERROR and agreed >= AGREED, (error, agreed)
