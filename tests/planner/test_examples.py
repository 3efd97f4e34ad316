"""The handbook's own worked examples, on the shapes of the models it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.errors import MemoryBudgetError
from gossamer.llm import engine_config
from gossamer.planner.advice import offload
from gossamer.planner.memory import plan_memory
from gossamer.planner.model import PlannedModel, open_planned
from gossamer.planner.objectives import Goal, Limits
from gossamer.planner.plan import make_plan
from tests.planner.models import RATES

GB = 10**9


def shape(shared: Path, name: str) -> tuple[PlannedModel, Path]:
    path = shared / "models" / "shapes" / name
    if not path.is_dir():
        pytest.skip(f"no shape {name} beside the repository")
    return open_planned(engine_config(path)), path


def test_7b_at_4_bits_takes_4_to_6_gb_of_weights(shared: Path) -> None:
    model, path = shape(shared, "llama-2-7b")
    goal = Goal.of("memory", Limits(memory=64 << 30), most=4096)
    found = make_plan(model, engine_config(path), goal, RATES)
    assert found.chosen.config.quantization is not None
    assert found.chosen.config.quantization.format == "int4"
    # 6.74e9 numbers at 4 bits and a scale for each group are 3.5 GB; the handbook's figure counts all that
    # runs beside: with the KV of one long conversation and the process it is that.
    assert 3.3 * GB < found.chosen.memory.engine.weights < 6 * GB
    assert found.chosen.bytes < 6 * GB
    assert found.keeping is not None and found.keeping.memory.engine.weights == pytest.approx(
        13.5 * GB, rel=0.02
    )


def test_70b_within_24_gb_is_a_matter_of_offloading(shared: Path) -> None:
    model, path = shape(shared, "llama-3.1-70b")
    budget = 24 * GB
    goal = Goal.of("memory", Limits(memory=budget), most=4096)
    with pytest.raises(MemoryBudgetError) as raised:
        make_plan(model, engine_config(path), goal, RATES)
    text = str(raised.value)
    assert (
        "nothing fits: the least that serves 1 request" in text and "more than the 22.4 GiB there are" in text
    )
    assert "offloading (built for GPUs alone) would keep 22.4 GiB here" in text and "25 GB/s" in text
    config = engine_config(
        path, quantization="int4-g128", max_model_len=384, max_num_seqs=1, kv_bytes=126 << 20
    )
    memory = plan_memory(model, config, 1 << 60)
    found = offload(memory, budget)
    assert found is not None and found.resident == budget
    assert found.streamed == memory.total - budget > 10 * GB
    assert [s for _, s in found.seconds] == [found.streamed / 25e9, found.streamed / 3e9]
    assert offload(memory, memory.total) is None and offload(memory, 1 << 20) is None
