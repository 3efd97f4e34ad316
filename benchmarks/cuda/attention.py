"""Attention over pages alone: decode against the bandwidth of a copy, prefill against the best of torch's own
backends. 32 query heads on 8 kv heads of 128; decode has 64 sequences of 8192 tokens, prefill one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cuda.measure import Bench, Line, Work
from gossamer.backends.cuda.step import Batch, KvLayer

__all__ = ["decode_attention", "decode_work", "prefill_attention", "prefill_work"]

_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128
_PAGE = 16
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
_PAGES = (torch.bfloat16, torch.int8)


def decode_attention(bench: Bench) -> Iterator[Line]:
    """One token for each sequence: bound by reading its keys and values."""
    for dtype in _PAGES:
        work = decode_work(bench, dtype)
        seconds = bench.seconds(work.call)
        yield Line(
            case=f"decode attention, 64 x 8192, {_name(dtype)} pages",
            value=work.bytes / seconds / 1e9,
            limit=bench.bandwidth / 1e9,
            unit="GB/s",
            against="a copy on the device",
            bar=0.85 if dtype is torch.bfloat16 else None,
            detail={"us": seconds * 1e6, "bytes": work.bytes},
        )


def prefill_attention(bench: Bench) -> Iterator[Line]:
    """A prompt of one sequence: bound by its products, of which a causal mask leaves half."""
    best, name = _best_of_torch(bench)
    for dtype in _PAGES:
        work = prefill_work(bench, dtype)
        seconds = bench.seconds(work.call)
        yield Line(
            case=f"prefill attention, 8192 causal, {_name(dtype)} pages",
            value=work.flops / seconds / 1e12,
            limit=work.flops / best / 1e12,
            unit="TFLOP/s",
            against=name,
            bar=0.75 if dtype is torch.bfloat16 else None,
            detail={"us": seconds * 1e6, "us_of_torch": best * 1e6},
        )


def decode_work(bench: Bench, dtype: torch.dtype) -> Work:
    """The kernel's call and the bytes of keys, values and their scales."""
    sequences, tokens = bench.some(64, 2), _tokens(bench)
    layer, batch = _step(bench, dtype, sequences, 1)
    each = _HEAD_DIM * dtype.itemsize + (4 if dtype is torch.int8 else 0)
    moved = 2.0 * sequences * tokens * _KV_HEADS * each
    return Work(call=_attention(bench, layer, batch, sequences), steps=1, bytes=moved)


def prefill_work(bench: Bench, dtype: torch.dtype) -> Work:
    """The kernel's call and the operations of two products below the diagonal."""
    tokens = _tokens(bench)
    layer, batch = _step(bench, dtype, 1, tokens)
    flops = 2.0 * _HEADS * _HEAD_DIM * tokens * tokens
    return Work(call=_attention(bench, layer, batch, tokens), steps=1, flops=flops)


def _tokens(bench: Bench) -> int:
    return bench.some(8192, 32)


def _best_of_torch(bench: Bench) -> tuple[float, str]:
    """Seconds of the same in bfloat16, without pages, and which backend it was."""
    shapes = [(1, heads, _tokens(bench), _HEAD_DIM) for heads in (_HEADS, _KV_HEADS, _KV_HEADS)]
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=bench.at) for shape in shapes)
    k, v = (x.repeat_interleave(_HEADS // _KV_HEADS, 1) for x in (k, v))
    times: list[tuple[float, str]] = []
    for backend in _BACKENDS:
        with sdpa_kernel(backend):
            try:
                seconds = bench.seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
            except RuntimeError:  # this build of torch lacks it
                continue
            times.append((seconds, f"torch, {backend.name.lower()}"))
    return min(times)


def _step(bench: Bench, dtype: torch.dtype, spans: int, rows: int) -> tuple[KvLayer, Batch]:
    """Spans of `rows` rows each, the last of their sequences' tokens, on pages dealt at random."""
    at, tokens = bench.at, _tokens(bench)
    width = tokens // _PAGE
    shape = (spans * width, _PAGE, _KV_HEADS, _HEAD_DIM)
    if dtype is torch.int8:
        pages = [torch.randint(-127, 127, shape, dtype=dtype, device=at) for _ in range(2)]
        scales = [torch.full(shape[:3], 0.01, device=at) for _ in range(2)]
        layer = KvLayer(keys=pages[0], values=pages[1], key_scales=scales[0], value_scales=scales[1])
    else:
        pages = [torch.randn(shape, dtype=dtype, device=at) for _ in range(2)]
        layer = KvLayer(keys=pages[0], values=pages[1])
    start = tokens - rows
    lines = [(i * rows, rows, start, i * width, -1) for i in range(spans)]
    own = torch.arange(rows, dtype=torch.int32, device=at).repeat(spans)
    batch = Batch(
        positions=start + own,
        spans=torch.tensor(lines, dtype=torch.int32, device=at),
        tables=torch.randperm(spans * width, dtype=torch.int32, device=at)[None],
        parents=own - 1,
        row_spans=torch.arange(spans, dtype=torch.int32, device=at).repeat_interleave(rows),
        most_rows=rows,
        most_slots=tokens,
    )
    return layer, batch


def _attention(bench: Bench, layer: KvLayer, batch: Batch, rows: int) -> Callable[[], object]:
    from gossamer.backends.cuda.kernels.attention import attention, scratch_bytes

    q = torch.randn(rows, _HEADS * _HEAD_DIM, dtype=torch.bfloat16, device=bench.at)
    out = torch.empty_like(q)
    size = scratch_bytes(_HEADS, _HEAD_DIM, rows, _tokens(bench))
    scratch = torch.empty(size // 4, device=bench.at)
    return lambda: attention(
        out, q, layer, batch, 0, heads=_HEADS, kv_heads=_KV_HEADS, head_dim=_HEAD_DIM, scale=_HEAD_DIM**-0.5,
        scratch=scratch,
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
