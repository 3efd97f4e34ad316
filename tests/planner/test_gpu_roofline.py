"""Steps on a GPU against sums by hand, and the limits that are remembered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gossamer.backends.cuda.rates import GpuRates
from gossamer.config import Quantization
from gossamer.planner import gpu_rates
from gossamer.planner.gpu_roofline import _pairs, gpu_step
from gossamer.runtime.planning import passed
from tests.planner.models import BASE, planned

GPU = GpuRates(
    name="NVIDIA H200", isa="sm_90", multiprocessors=132, memory_total=141 << 30, memory_free=139 << 30,
    copy_gb_s=4300.0, tflops={"bf16": 790.0, "f16": 790.0, "tf32": 400.0, "f32": 50.0, "int8": 1500.0},
    to_device_gb_s=55.0, to_host_gb_s=55.0, launch_us=5.0,
)  # fmt: skip


def test_decode_waits_for_weights_and_keys() -> None:
    graph, _ = passed(planned(hidden_size=1024, intermediate_size=4096).graph, BASE)
    weights = 2.0 * (2 * (1024 * 1024 * (1 + 0.5 + 0.5 + 1) + 3 * 1024 * 4096) + 1024 * 2048)
    keys = 2 * 2 * 2 * 256 * 2.0  # of a token: layers, keys and values, heads, head_dim, bytes
    step = gpu_step(graph, GPU, [(1, 1000, 1)], 1, "bf16")
    assert step.bytes == pytest.approx(weights + keys * 1001, rel=0.02)
    assert step.seconds == pytest.approx(step.bytes / 4300e9, rel=0.01)
    more = gpu_step(graph, GPU, [(8, 1000, 1)], 8, "bf16")
    assert more.bytes - step.bytes == pytest.approx(7 * keys * 1001, rel=0.05)
    assert gpu_step(graph, GPU, [(8, 1000, 1)], 8, "f32").bytes > more.bytes
    assert gpu_step(graph, GPU, [(1, 1000, 1)], 1, "bf16", streamed=55 * 10**9).seconds == pytest.approx(1.0)
    assert step.without_recording() == step.launch_seconds == pytest.approx(len(graph.nodes) * 5e-6)


def test_prefill_multiplies() -> None:
    graph, _ = passed(planned(hidden_size=1024, intermediate_size=4096).graph, BASE)
    step = gpu_step(graph, GPU, [(1, 0, 8192)], 1, "bf16")
    macs = 8192 * 2 * (3 * 1024 * 1024 + 3 * 1024 * 4096) + 2 * 2 * 1024 * 8192 * 8193 / 2
    assert step.macs == pytest.approx(macs, rel=0.01)
    assert step.macs / 395e12 < step.seconds < 2 * step.macs / 395e12
    int8, _ = passed(
        planned(hidden_size=1024, intermediate_size=4096).graph,
        replace(BASE, mixed_precision=None, quantization=Quantization(format="int8")),
    )
    assert gpu_step(int8, GPU, [(1, 0, 8192)], 1, "int8").seconds < step.seconds


def test_experts_that_nobody_chose_are_not_read() -> None:
    moe = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    graph, _ = passed(planned(**moe).graph, BASE)
    one, all_ = (gpu_step(graph, GPU, [(n, 10, 1)], n, "bf16").bytes for n in (1, 512))
    experts = 2 * 8 * 3 * 256 * 1024 * 2.0
    assert all_ - one > 0.7 * experts and one < experts


@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
def test_pairs_are_those_that_attention_sees(window: int | None) -> None:
    for before in range(6):
        for new in range(1, 6):
            seen = [before + i + 1 for i in range(new)]
            want = sum(min(n, window) if window else n for n in seen)
            assert _pairs([(2, before, new)], window) == 2 * want


def test_limits_are_remembered_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    assert gpu_rates.remembered_gpu() is None
    probe = pytest.importorskip("gossamer.backends.cuda.probe")
    monkeypatch.setattr(probe, "gpu_here", lambda: "device")
    monkeypatch.setattr(probe, "probe_gpu", lambda device: GPU)
    assert gpu_rates.measure_gpu() == GPU
    assert gpu_rates.remembered_gpu() == gpu_rates.remembered_gpu("NVIDIA H200") == GPU
    assert gpu_rates.remembered_gpu("NVIDIA L4") is None
    (tmp_path / "gpu-rates.json").write_text('{"": {"name": 1}}')
    assert gpu_rates.remembered_gpu() is None
    monkeypatch.setattr(probe, "gpu_here", lambda: None)
    assert gpu_rates.measure_gpu() is None
