"""Times the cuda backend's attention alone, on a GPU: python -m benchmarks.cuda_attention [--json].

Decode (64 sequences of 8192 tokens, 32 query heads on 8 kv heads of 128) is held against the bandwidth of a
copy on the same device; prefill (8192 tokens, causal) against the best of torch's own backends. Times are
medians of CUDA events, after a first run that compiles.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gossamer.backends.cuda.device import interpreted, open_device
from gossamer.backends.cuda.step import Batch, KvLayer
from gossamer.errors import ConfigError, GossamerError

__all__ = ["Line", "copy_bandwidth", "decode", "main", "prefill"]

_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128
_TOKENS = 8192
_SEQUENCES = 64
_PAGE = 16
_REPEATS = 20
_COPIED = 1 << 30
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One measurement. rate, limit: of the kernel and of what it is held against, in the unit."""

    case: str
    seconds: float
    rate: float
    limit: float
    unit: str
    against: str


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB on the device."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED / _seconds(lambda: target.copy_(source))


def decode(device: torch.device, dtype: torch.dtype, bandwidth: float) -> Line:
    """One token for each sequence: bound by reading its keys and values."""
    layer, batch = _step(device, dtype, _SEQUENCES, 1)
    seconds = _seconds(_attention(device, layer, batch, _SEQUENCES))
    slots = _SEQUENCES * _TOKENS * _KV_HEADS
    moved = 2 * slots * (_HEAD_DIM * dtype.itemsize + (4 if dtype is torch.int8 else 0))
    case = f"decode, {_SEQUENCES} x {_TOKENS}, {_name(dtype)} pages"
    return Line(
        case=case,
        seconds=seconds,
        rate=moved / seconds / 1e9,
        limit=bandwidth / 1e9,
        unit="GB/s",
        against="copy",
    )


def prefill(device: torch.device, dtype: torch.dtype) -> Line:
    """A prompt of one sequence: bound by its products, of which a causal mask leaves half."""
    layer, batch = _step(device, dtype, 1, _TOKENS)
    seconds = _seconds(_attention(device, layer, batch, _TOKENS))
    flops = 2.0 * _HEADS * _HEAD_DIM * _TOKENS * _TOKENS
    best, name = _best_of_torch(device)
    case = f"prefill, {_TOKENS} causal, {_name(dtype)} pages"
    return Line(
        case=case,
        seconds=seconds,
        rate=flops / seconds / 1e12,
        limit=flops / best / 1e12,
        unit="TFLOP/s",
        against=name,
    )


def _best_of_torch(device: torch.device) -> tuple[float, str]:
    """Seconds of the same in bfloat16, without pages, and which backend it was."""
    shapes = [(1, heads, _TOKENS, _HEAD_DIM) for heads in (_HEADS, _KV_HEADS, _KV_HEADS)]
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in shapes)
    k, v = (x.repeat_interleave(_HEADS // _KV_HEADS, 1) for x in (k, v))
    times: list[tuple[float, str]] = []
    for backend in _BACKENDS:
        with sdpa_kernel(backend):
            try:
                seconds = _seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
            except RuntimeError:  # this build of torch lacks it
                continue
            times.append((seconds, f"torch, {backend.name.lower()}"))
    return min(times)


def _step(device: torch.device, dtype: torch.dtype, spans: int, rows: int) -> tuple[KvLayer, Batch]:
    """Spans of `rows` rows each whose sequences have _TOKENS tokens after them, on pages dealt at random."""
    width = _TOKENS // _PAGE
    shape = (spans * width, _PAGE, _KV_HEADS, _HEAD_DIM)
    if dtype is torch.int8:
        pages = [torch.randint(-127, 127, shape, dtype=dtype, device=device) for _ in range(2)]
        scales = [torch.full(shape[:3], 0.01, device=device) for _ in range(2)]
        layer = KvLayer(keys=pages[0], values=pages[1], key_scales=scales[0], value_scales=scales[1])
    else:
        pages = [torch.randn(shape, dtype=dtype, device=device) for _ in range(2)]
        layer = KvLayer(keys=pages[0], values=pages[1])
    start = _TOKENS - rows
    lines = [(i * rows, rows, start, i * width, -1) for i in range(spans)]
    own = torch.arange(rows, dtype=torch.int32, device=device).repeat(spans)
    batch = Batch(
        positions=start + own,
        spans=torch.tensor(lines, dtype=torch.int32, device=device),
        tables=torch.randperm(spans * width, dtype=torch.int32, device=device)[None],
        parents=own - 1,
        row_spans=torch.arange(spans, dtype=torch.int32, device=device).repeat_interleave(rows),
        most_rows=rows,
        most_slots=_TOKENS,
    )
    return layer, batch


def _attention(device: torch.device, layer: KvLayer, batch: Batch, rows: int) -> Callable[[], object]:
    from gossamer.backends.cuda.kernels.attention import attention, scratch_bytes

    q = torch.randn(rows, _HEADS * _HEAD_DIM, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(q)
    size = scratch_bytes(_HEADS, _HEAD_DIM, _SEQUENCES, _TOKENS)
    scratch = torch.empty(size // 4, device=device)
    return lambda: attention(
        out, q, layer, batch, 0, heads=_HEADS, kv_heads=_KV_HEADS, head_dim=_HEAD_DIM, scale=_HEAD_DIM**-0.5,
        scratch=scratch,
    )  # fmt: skip


def _seconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    begins, ends = ([_event() for _ in range(_REPEATS)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    milliseconds = [float(begin.elapsed_time(end)) for begin, end in zip(begins, ends, strict=True)]
    return median(milliseconds) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="lines as JSON")
    options = parser.parse_args(arguments)
    try:
        if interpreted():
            raise ConfigError("times of Triton's interpreter say nothing: unset TRITON_INTERPRET")
        device = open_device()
    except GossamerError as error:
        print(f"this benchmark needs an NVIDIA GPU: {error}", file=sys.stderr)
        return 1
    bandwidth = copy_bandwidth(device.torch)
    lines = [decode(device.torch, dtype, bandwidth) for dtype in (torch.bfloat16, torch.int8)]
    lines += [prefill(device.torch, dtype) for dtype in (torch.bfloat16, torch.int8)]
    if options.json:
        print(json.dumps({"device": device.name, "lines": [asdict(line) for line in lines]}, indent=1))
        return 0
    print(f"{device.name} ({device.isa})")
    for line in lines:
        print(
            f"{line.case:40} {line.seconds * 1e6:9.1f} us {line.rate:8.1f} {line.unit:8}"
            f" {line.rate / line.limit:6.1%} of {line.limit:.1f} ({line.against})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
