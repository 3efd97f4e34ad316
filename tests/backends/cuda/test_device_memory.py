"""What a GPU really holds, against the byte plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gossamer.config import MixedPrecision, Quantization
from tests.backends.cuda.test_program import config_of, graph_of, logits, started


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{"mixed_precision": MixedPrecision()}, {"quantization": Quantization(format="int4", group=32)}],
    ids=["bf16", "int4"],
)
def test_a_gpu_holds_no_more_than_was_planned(options: dict[str, Any]) -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    program, executor, after = started(graph_of("llama"), config_of(kv_dtype="bf16", **options))
    logits(executor, after)
    logits(executor, after)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0 < taken <= program.memory.total
