"""The rows of the table, each measured by a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.cuda.attention import decode_attention, decode_work, prefill_attention, prefill_work
from benchmarks.cuda.decode import decode, gap, open_decode
from benchmarks.cuda.measure import Bench, Line, Work
from benchmarks.cuda.offloading import offloading, open_offloading
from benchmarks.cuda.prefill import open_prefill, prefill
from benchmarks.cuda.serving import open_serving, serving, static_cache, transformers_batching

__all__ = ["ROWS", "Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """lines: measures, and gives a figure as soon as it has it. limit: seconds after which the row is given
    up. work: what its profile looks at; None: it is another program's."""

    lines: Callable[[Bench], Iterator[Line]]
    limit: int
    work: Callable[[Bench], Work] | None = None


def _decode(format: str) -> Row:
    return Row(partial(decode, format=format), 120, lambda b: open_decode(b, "llama-3.1-8b", format)[1])


ROWS: dict[str, Row] = {
    "attention-decode": Row(decode_attention, 60, partial(decode_work, dtype=torch.bfloat16)),
    "attention-prefill": Row(prefill_attention, 60, partial(prefill_work, dtype=torch.bfloat16)),
    "decode-bf16": _decode("bf16"),
    "decode-int4": _decode("int4"),
    "decode-fp8": _decode("fp8"),
    "gap": Row(gap, 90, lambda b: open_decode(b, "llama-3.2-1b", "bf16")[1]),
    "prefill": Row(prefill, 120, lambda b: open_prefill(b)[1]),
    "serving": Row(serving, 180, lambda b: open_serving(b)[1]),
    "transformers-batching": Row(transformers_batching, 240),
    "transformers-static": Row(static_cache, 300),
    "offloading": Row(offloading, 300, lambda b: open_offloading(b)[1]),
}
