"""Which device runs: an NVIDIA GPU, or Triton's interpreter where TRITON_INTERPRET=1 asks for it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from dataclasses import dataclass

import torch

from gossamer.errors import ConfigError, DependencyError

__all__ = ["Device", "device_to_plan", "interpreted", "open_device", "require_chip"]

_LEAST = (8, 0)  # bf16 and asynchronous copies: Ampere
_FP8 = (8, 9)  # the first chips that multiply and convert E4M3: Ada


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """name: as people know it; capability: (major, minor) of the chip, (0, 0) of the interpreter; memory:
    bytes that are free."""

    torch: torch.device
    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def isa(self) -> str:
        """For receipts: sm_90, or interpreter."""
        major, minor = self.capability
        return f"sm_{major}{minor}" if major else "interpreter"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: Triton decides when its kernels are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def open_device() -> Device:
    """The first GPU that this process may use.

    Raises DependencyError where Triton is missing, ConfigError where there is no GPU or none that will do.
    """
    if importlib.util.find_spec("triton") is None:
        raise DependencyError("the cuda backend needs Triton; install it with: pip install 'gossamer[cuda]'")
    if interpreted():
        from gossamer.memory import available_memory

        return Device(
            torch=torch.device("cpu"),
            name="Triton's interpreter",
            capability=(0, 0),
            memory=available_memory(),
        )
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        why = (
            "torch sees none (nvidia-smi shows what the driver sees, CUDA_VISIBLE_DEVICES what is hidden)"
            if built
            else f"torch {torch.__version__} is built without CUDA; install a CUDA build of it"
        )
        raise ConfigError(
            f"--device cuda needs an NVIDIA GPU: {why}. --device cpu runs here; TRITON_INTERPRET=1 runs the "
            "GPU's kernels on the CPU, very slowly, for tests"
        )
    chip = torch.cuda.get_device_properties(0)
    capability = (chip.major, chip.minor)
    if capability < _LEAST:
        raise ConfigError(
            f"{chip.name} is of compute capability {chip.major}.{chip.minor}, and the kernels need "
            f"{_LEAST[0]}.{_LEAST[1]} (bf16) at least; --device cpu runs here"
        )
    free, _ = torch.cuda.mem_get_info(0)
    return Device(torch=torch.device("cuda", 0), name=chip.name, capability=capability, memory=free)


def device_to_plan(memory_budget: int | None) -> Device:
    """The GPU that is here; where none is, one of the newest kind with so many bytes, which can be planned
    for but runs nothing. Raises as `open_device`, and ConfigError where nobody says how many bytes."""
    if interpreted() or torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return open_device()
    if memory_budget is None:
        raise ConfigError(
            "there is no GPU here whose memory could be planned; --memory-budget says how much there is to "
            "be (such as 24GB, or 139GiB for an H200)"
        )
    name = f"a GPU with {memory_budget / (1 << 30):.2f} GiB"
    return Device(torch=torch.device("meta"), name=name, capability=(9, 0), memory=memory_budget)


def require_chip(weights: Collection[str], kv_dtype: str, device: Device) -> None:
    """Raises ConfigError for a format of weights, or of keys and values, that the chip has nothing for, with
    the nearest that it has. The interpreter has all."""
    if device.capability == (0, 0) or device.capability >= _FP8:
        return
    for what, asked, flag in (
        ("weights", "fp8" in weights, "--quantization"),
        ("keys and values", kv_dtype == "fp8", "--kv-cache-dtype"),
    ):
        if asked:
            raise ConfigError(
                f"{what} in fp8 need compute capability {_FP8[0]}.{_FP8[1]} at least, and {device.name} has "
                f"{device.capability[0]}.{device.capability[1]}; the nearest it has is int8 ({flag} int8)"
            )
