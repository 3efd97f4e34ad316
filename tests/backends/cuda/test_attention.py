"""Attention over pages against the torch reference over what the pages hold."""

from __future__ import annotations

import pytest
import torch

from gossamer.backends.cuda.kernels.attention import attention, scratch_bytes
from gossamer.backends.cuda.kernels.attention_decode import choose_splits, few_rows
from gossamer.errors import ConfigError
from gossamer.graph.ops import get_op
from gossamer.graph.ops.attention import KVState
from tests.backends.cuda.steps import FORMATS, MOST, Step, fill, make_layer, make_step, stored

# Of weights and queries in the pages' type; the interpreter cuts to bfloat16 where hardware rounds.
TOLERANCES = {"f32": 3e-6, "f16": 2e-3, "bf16": 1.2e-2, "int8": 1.2e-2, "fp8": 1.2e-2}
DTYPES = {name: torch.bfloat16 if name in MOST else dtype for name, dtype in FORMATS.items()}
TREE = (-1, 0, 0, 1, 2, 2, -1, 6)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(out: torch.Tensor) -> float:
    """Tolerance of float32, which a GPU multiplies as three products in tf32."""
    return 3e-5 if out.is_cuda else TOLERANCES["f32"]


def check(
    device: torch.device,
    step: Step,
    format: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    page_size: int = 16,
    groups: int = 1,
    scratch: torch.Tensor | None = None,
) -> None:
    """Runs a step and its reference, which reads what the pages hold."""
    layer = make_layer(device, step, kv_heads, head_dim, format, page_size)
    cache = {}
    for i, span in enumerate(step.spans):
        slots = span.start + span.count
        k, v = (random(slots, kv_heads, head_dim, seed=10 * i + s).to(device) for s in (1, 2))
        k *= torch.linspace(0.5, 1.5, slots, device=device)[:, None, None]  # what comes later weighs more
        fill(layer, step, i, k, v, groups - 1)
        cache[(0, i)] = stored(layer, step, i, groups - 1)
    q = (2 * random(step.rows, heads * head_dim)).to(device, DTYPES[format])
    out = torch.full_like(q, torch.nan)
    attrs = {
        "layer": 0, "heads": heads, "head_dim": head_dim, "scale": head_dim**-0.5, "window": window,
        "softcap": softcap,
    }  # fmt: skip
    attention(
        out, q, layer, step.batch, groups - 1, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        scale=head_dim**-0.5, softcap=softcap, window=window, scratch=scratch,
    )  # fmt: skip
    (want,) = get_op("attention").reference(attrs, [q.float(), 0], [], KVState(step.spans, cache))
    tolerance = TOLERANCES[format] if format != "f32" else exact(out)
    torch.testing.assert_close(out.float(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 16), (5, 1, 8), (7, 7, 24), (8, 1, 80), (3, 3, 256)]
)
@pytest.mark.parametrize(
    "spans",
    [
        ((1, 0), (1, 70), (1, 5)),  # decodes
        ((4, 130), (1, 64), (7, 0)),  # drafts
        ((70, 0), (1, 90), (20, 37)),  # prefill beside a decode
    ],
)
def test_heads_and_spans(
    device: torch.device,
    format: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    spans: tuple[tuple[int, int], ...],
) -> None:
    check(device, make_step(device, spans, groups=2), format, heads, kv_heads, head_dim, groups=2)


@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("window", [None, 1, 20, 300])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("spans", [((1, 300), (3, 255), (2, 600)), ((40, 280), (1, 330))])
def test_windows_and_caps(
    device: torch.device,
    format: str,
    window: int | None,
    softcap: float | None,
    spans: tuple[tuple[int, int], ...],
) -> None:
    step = make_step(device, spans, page_size=48)
    check(device, step, format, 2, 1, 16, window=window, softcap=softcap, page_size=48)


@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize(("count", "other"), [(8, 1), (8, 30)])
def test_trees(device: torch.device, format: str, window: int | None, count: int, other: int) -> None:
    spans = [(count, 61), (other, 50), (count, 0)]
    step = make_step(device, spans, trees={0: TREE, 2: TREE})
    check(device, step, format, 4, 2, 16, window=window)


def test_a_tree_of_prefills_size(device: torch.device) -> None:
    parents = tuple((i - 1) // 2 for i in range(1, 40))
    step = make_step(device, [(40, 30), (3, 3)], trees={0: (-1, *parents)})
    check(device, step, "f32", 4, 1, 16)


def test_pages_below_the_window_are_not_read(device: torch.device) -> None:
    for spans in ([(1, 100), (1, 40)], [(30, 100), (1, 100)]):
        step = make_step(device, spans)
        kept = step.batch.tables.clone()
        layer = make_layer(device, step, 1, 16, "f32")
        cache = {}
        for i, span in enumerate(step.spans):
            k, v = (random(span.start + span.count, 1, 16, seed=i + s).to(device) for s in (1, 2))
            fill(layer, step, i, k, v)
            cache[(0, i)] = (k, v)
        q = random(step.rows, 32).to(device)
        out = torch.empty_like(q)
        for line in step.batch.spans.tolist():
            step.batch.tables[0, line[3] : line[3] + max(0, line[2] + 1 - 20) // 16] = -1
        attention(out, q, layer, step.batch, 0, heads=2, kv_heads=1, head_dim=16, scale=0.25, window=20)
        attrs = {"layer": 0, "heads": 2, "head_dim": 16, "scale": 0.25, "window": 20, "softcap": None}
        (want,) = get_op("attention").reference(attrs, [q, 0], [], KVState(step.spans, cache))
        torch.testing.assert_close(out, want, rtol=exact(out), atol=exact(out))
        assert not torch.equal(kept, step.batch.tables)


@pytest.mark.parametrize(
    "spans",
    [
        ((2, 1400), (1, 3)),  # of the short one's parts all but the first are empty
        ((4, 510), (1, 600)),  # the last part begins behind the first rows of the draft
        ((1, 4600),),  # more parts than are merged at once
        ((16, 500), (1, 600), (1, 700)),  # all have room for as many rows as the first has
    ],
)
def test_splits_are_merged_in_scratch_of_the_planned_size(
    device: torch.device, spans: tuple[tuple[int, int], ...]
) -> None:
    step = make_step(device, spans)
    size = scratch_bytes(2, 16, len(spans), step.batch.most_slots) // 4
    scratch = torch.full((size,), torch.nan, device=device)
    check(device, step, "f32", 2, 1, 16, scratch=scratch)
    assert not scratch.isnan().all()


@pytest.mark.parametrize("spans", [1, 3, 64, 512])
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("slots", [1, 256, 257, 8192, 131072])
def test_splits(spans: int, rows: int, slots: int) -> None:
    splits = choose_splits(spans, 8, rows, slots, 132)
    assert splits >= 1
    if splits > 1:
        assert (splits - 1) * 256 < slots
        assert spans * rows * splits * 32 * 129 * 4 <= scratch_bytes(32, 128, spans, slots)


def test_one_sequence_keeps_all_multiprocessors_busy() -> None:
    assert choose_splits(1, 8, 1, 32768, 132) * 8 >= 2 * 132
    assert choose_splits(512, 8, 1, 1024, 132) == 1
    assert choose_splits(1, 8, 1, 200, 132) == 1


@pytest.mark.parametrize(
    ("most_rows", "group", "few"), [(1, 4, 1), (16, 8, 16), (16, 16, 1), (17, 4, 4), (500, 32, 1)]
)
def test_what_a_decode_is(most_rows: int, group: int, few: int) -> None:
    assert few_rows(most_rows, group, 128) == few


def test_more_heads_than_a_tile_are_refused(device: torch.device) -> None:
    step = make_step(device, [(1, 0)])
    with pytest.raises(ConfigError, match="at most 32"):
        check(device, step, "f32", 33, 1, 256)
    with pytest.raises(ConfigError, match="at most 256"):
        check(device, step, "f32", 1, 1, 264)
    check(device, step, "f32", 32, 1, 256)
