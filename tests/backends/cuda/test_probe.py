"""The GPU's probe: its code on tiny sizes anywhere, its figures on a GPU."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from gossamer.backends.cuda.device import open_device
from gossamer.backends.cuda.probe import gpu_here, probe_gpu

KINDS = {"bf16", "f16", "tf32", "f32", "int8"}


def test_every_limit_is_measured() -> None:
    device = open_device()
    rates = probe_gpu(device, side=128, copied=1 << 20, linked=1 << 20, rounds=3)
    assert set(rates.tflops) - {"fp8"} == KINDS and ("fp8" in rates.tflops) == (device.capability >= (8, 9))
    figures = [v for v in asdict(rates).values() if isinstance(v, int | float)]
    assert min(*figures, *rates.tflops.values()) >= 0 and rates.copy_gb_s > 0 and rates.launch_us > 0
    assert (rates.name, rates.isa, rates.memory_free) == (device.name, device.isa, device.memory)


def test_the_interpreter_is_no_gpu() -> None:
    assert (gpu_here() is None) == (open_device().torch.type == "cpu")


@pytest.mark.gpu
def test_limits_of_a_gpu_are_in_their_units() -> None:
    device = gpu_here()
    assert device is not None
    rates = probe_gpu(device)
    # From a small Ampere chip, which other tests keep busy, to the largest of today.
    assert 10 < rates.copy_gb_s < 20_000
    assert all(0.1 < rate < 10_000 for rate in rates.tflops.values())
    assert 0.1 < rates.to_device_gb_s < 1_000 and 0.1 < rates.to_host_gb_s < 1_000
    assert rates.multiprocessors > 1 and rates.memory_total >= rates.memory_free > 0
    assert 0.5 < rates.launch_us < 10_000
