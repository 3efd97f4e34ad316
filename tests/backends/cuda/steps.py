"""Steps on pages for tests of kernels: spans become a Batch, and pages become what a sequence sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gossamer.backends.cuda.step import Batch, KvLayer
from gossamer.graph.ops.attention import SpanRows, tree_depths
from gossamer.graph.ops.formats import round_kv

__all__ = ["FORMATS", "Step", "fill", "make_layer", "make_step", "stored"]

FORMATS = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip
MOST = {"int8": 127, "fp8": 448}
"""The greatest code of formats with scales."""


@dataclass(frozen=True)
class Step:
    """spans: as the reference takes them; pages: how many there are in all."""

    batch: Batch
    spans: tuple[SpanRows, ...]
    pages: int

    @property
    def rows(self) -> int:
        return sum(span.count for span in self.spans)


def make_step(
    device: torch.device,
    spans: Sequence[tuple[int, int]],
    *,
    page_size: int = 16,
    groups: int = 1,
    trees: dict[int, tuple[int, ...]] | None = None,
) -> Step:
    """spans: rows and start of each. trees: parents of the spans that are trees. Pages are dealt at random,
    every group's its own."""
    trees = trees or {}
    slots = [count + start for count, start in spans]
    width = max(-(-n // page_size) for n in slots)
    pages = groups * len(spans) * width
    dealt = torch.randperm(pages, generator=torch.Generator().manual_seed(7)).to(torch.int32)
    lines, taken, row = [], [], 0
    for i, (count, start) in enumerate(spans):
        lines.append((row, count, start, i * width, 0 if i in trees else -1))
        taken.append(SpanRows(i, row, count, start, trees.get(i)))
        row += count
    positions = [
        start + depth
        for i, (count, start) in enumerate(spans)
        for depth in (tree_depths(trees[i]) if i in trees else range(count))
    ]
    parents = [p for i, (count, _) in enumerate(spans) for p in trees.get(i, range(-1, count - 1))]
    owners = [i for i, (count, _) in enumerate(spans) for _ in range(count)]
    ints = {"dtype": torch.int32, "device": device}
    batch = Batch(
        positions=torch.tensor(positions, **ints),
        spans=torch.tensor(lines, **ints),
        tables=dealt.reshape(groups, -1).to(device),
        parents=torch.tensor(parents, **ints),
        row_spans=torch.tensor(owners, **ints),
        most_rows=max(count for count, _ in spans),
        most_slots=max(slots),
        tree=bool(trees),
    )
    return Step(batch, tuple(taken), pages)


def make_layer(
    device: torch.device, step: Step, kv_heads: int, head_dim: int, format: str, page_size: int = 16
) -> KvLayer:
    """Pages full of what must never be read: NaN, or NaN scales where there are any."""
    shape = (step.pages, page_size, kv_heads, head_dim)
    if format in MOST:
        pages = [torch.full(shape, 96, dtype=FORMATS[format], device=device) for _ in range(2)]
        scales = [torch.full(shape[:3], torch.nan, device=device) for _ in range(2)]
        return KvLayer(keys=pages[0], values=pages[1], key_scales=scales[0], value_scales=scales[1])
    pages = [torch.full(shape, torch.nan, dtype=FORMATS[format], device=device) for _ in range(2)]
    return KvLayer(keys=pages[0], values=pages[1])


def _slots(step: Step, span: int, page_size: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages and places in them of all slots that the span's sequence has after the step."""
    batch, line = step.batch, step.spans[span]
    slot = torch.arange(line.start + line.count, device=batch.tables.device)
    offset = int(batch.spans[span, 3])
    return batch.tables[group, offset + slot // page_size].long(), slot % page_size


def stored(layer: KvLayer, step: Step, span: int, group: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 keys and values [slots, kv_heads, head_dim] of a span's sequence."""
    at = _slots(step, span, layer.keys.shape[1], group)
    k, v = layer.keys[at].float(), layer.values[at].float()
    if layer.key_scales is not None and layer.value_scales is not None:
        return k * layer.key_scales[at][..., None], v * layer.value_scales[at][..., None]
    return k, v


def fill(layer: KvLayer, step: Step, span: int, k: torch.Tensor, v: torch.Tensor, group: int = 0) -> None:
    """Stores keys and values [slots, kv_heads, head_dim], rounded as torch rounds."""
    at = _slots(step, span, layer.keys.shape[1], group)
    pairs = ((k, layer.keys, layer.key_scales), (v, layer.values, layer.value_scales))
    for x, pages, scales in pairs:
        if scales is None:
            pages[at] = x.to(pages.dtype)
            continue
        format = "int8" if pages.dtype == torch.int8 else "fp8"
        scale = x.abs().amax(-1) / MOST[format]
        scales[at] = scale
        codes = round_kv(x, format) / scale.clamp(min=1e-30)[..., None]
        pages[at] = (codes.round() if format == "int8" else codes).to(pages.dtype)
