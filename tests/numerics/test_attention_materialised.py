"""Attention with its scores in memory: against the torch reference, against FlashAttention's bits, and bit by
bit against itself however it is cut, on every instruction set of this machine."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.backends.cpu.program import CpuProgram
from gossamer.backends.reference.module import ReferenceModel
from gossamer.graph.ops.attention import KVState, SpanRows, tree_depths
from tests.numerics.harness import ISAS, Arrays, make_cpu, run_cpu, run_reference
from tests.numerics.test_attention import (
    START,
    TOLERANCES,
    Case,
    attention,
    dtypes,
    isas,
    path_of,
    run_cut,
    step,
    trees,
)
from tests.numerics.test_cpu_ops import close


def materialised(c: Case, tokens: int, isa: str, kv_dtype: str, **shape: int) -> CpuProgram:
    return make_cpu(c.graph, c.arrays, tokens, isa=isa, kv_dtype=kv_dtype, flash=False, **shape)


def kernels(program: CpuProgram) -> dict[str, int]:
    return {line.kernel: line.calls for line in program.receipt()}


@isas
@dtypes
@pytest.mark.parametrize("size", [24, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (71, 1)])
def test_head_sizes_and_groups(isa: str, kv_dtype: str, size: int, heads: int, kv_heads: int) -> None:
    """Within one split of keys the bits are FlashAttention's. 71 heads of a group do not fit into a tile."""
    c = attention(70, heads, kv_heads, size)
    spans, tables = ((0, 1, 0), (1, 50, 0), (51, 19, 0)), [[6], [3, 0, 5, 1], [2, 7]]
    program = materialised(c, 70, isa, kv_dtype, pages=8)
    got = run_cpu(c.graph, c.arrays, 70, isa=isa, spans=spans, tables=tables, program=program)
    close(got, run_reference(c.graph, c.arrays, 70, spans=spans, kv_dtype=kv_dtype), TOLERANCES[kv_dtype])
    flash = run_cpu(c.graph, c.arrays, 70, isa=isa, spans=spans, tables=tables, pages=8, kv_dtype=kv_dtype)
    assert np.array_equal(got, flash)
    assert kernels(program)["attention_materialised"] == 1 and "attention" not in kernels(program)


@isas
@dtypes
@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (None, 4.0), (1, None), (20, 4.0), (600, None)]
)
def test_long_windowed_and_capped(isa: str, kv_dtype: str, window: int | None, softcap: float | None) -> None:
    tokens = 1100  # more than two splits of keys
    c = attention(tokens, 2, 1, 16, window, softcap)
    program = materialised(c, tokens, isa, kv_dtype, pages=70)
    got = run_cpu(c.graph, c.arrays, tokens, isa=isa, pages=70, program=program)
    close(got, run_reference(c.graph, c.arrays, tokens, kv_dtype=kv_dtype), TOLERANCES[kv_dtype])


@isas
@dtypes
@pytest.mark.parametrize("window", [None, 300])
def test_same_bits_however_it_is_cut(isa: str, kv_dtype: str, window: int | None) -> None:
    """Chunks, page sizes, page order, threads and what a page held before leave every bit alone."""
    tokens = 700
    c = attention(tokens, 4, 2, 24, window)
    whole = run_cut(materialised(c, tokens, isa, kv_dtype, pages=44), [tokens], np.arange(44), poison=False)
    for page_size, pages, threads, chunk in ((32, 24, 1, 700), (112, 7, 2, 97), (16, 44, 2, 33)):
        program = materialised(c, tokens, isa, kv_dtype, pages=pages, page_size=page_size, threads=threads)
        chunks = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
        table = np.random.default_rng(page_size).permutation(pages)
        assert np.array_equal(run_cut(program, chunks, table), whole), (page_size, chunk)


@isas
@dtypes
def test_company_leaves_bits_alone(isa: str, kv_dtype: str) -> None:
    """A sequence beside others, empty ones too, whose matrices lie before and after its own."""
    c = attention(70, 4, 4, 8)
    alone = run_cpu(
        c.graph, c.arrays, 5, isa=isa, pages=4, program=materialised(c, 5, isa, kv_dtype, pages=4)
    )
    spans, tables = ((0, 0, 0), (0, 5, 0), (5, 0, 3), (5, 65, 0)), [[0], [7], [0], [1, 6, 3, 2, 5]]
    got = run_cpu(
        c.graph, c.arrays, 70, isa=isa, spans=spans, tables=tables,
        program=materialised(c, 70, isa, kv_dtype, pages=8),
    )  # fmt: skip
    assert np.array_equal(got[:5], alone)


@isas
@dtypes
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_no_number_shows_where_it_is_seen(isa: str, kv_dtype: str, bad: float) -> None:
    tokens, at = 60, 37
    c = attention(tokens, 4, 2, 24)
    clean = run_cpu(c.graph, c.arrays, tokens, isa=isa, program=materialised(c, tokens, isa, kv_dtype))
    for name in "kv":
        arrays = {n: a.copy() for n, a in c.arrays.items()}
        arrays[name][at, 5] = bad
        program = materialised(Case(c.graph, arrays), tokens, isa, kv_dtype)
        got = run_cpu(c.graph, arrays, tokens, isa=isa, program=program)
        assert np.array_equal(got[:at], clean[:at])
        if name == "v":
            assert not np.isfinite(got[at:]).all(1).any()
        assert np.array_equal(run_cut(program, [1] * tokens, np.arange(8)), got, equal_nan=True)


@cache
def tree_program(isa: str, kv_dtype: str, window: int | None) -> CpuProgram:
    program = materialised(attention(600, 6, 2, 24, window), 600, isa, kv_dtype, pages=38)
    program.tables[:38] = np.random.default_rng(1).permutation(38)
    return program


@settings(max_examples=20, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    kv_dtype=st.sampled_from(list(TOLERANCES)),
    window=st.sampled_from([None, 5, 70]),
    start=st.sampled_from([0, 16, 47, START]),
    parents=trees,
)
def test_a_path_of_a_tree_has_the_bits_of_a_chain(
    isa: str, kv_dtype: str, window: int | None, start: int, parents: tuple[int, ...]
) -> None:
    program = tree_program(isa, kv_dtype, window)

    def after(ids: list[int], parents: tuple[int, ...] | None) -> np.ndarray:
        for pool in program.kv:
            pool[:] = 0xFF
        if start:
            step(program, list(range(start)), 0, None)
        return step(program, ids, start, parents)

    together = after([start + i for i in range(len(parents))], parents)
    path = path_of(parents, len(parents) - 1)
    assert np.array_equal(together[path], after([start + t for t in path], None))


@isas
@dtypes
@pytest.mark.parametrize("window", [None, 70])
def test_trees_against_the_reference(isa: str, kv_dtype: str, window: int | None) -> None:
    parents = (-1, 0, 0, 1, 1, -1, 5, 6, 3, 8, 2, 9, 11, 12)  # to a depth beyond a split
    c = attention(600, 6, 2, 24, window)
    program, start = tree_program(isa, kv_dtype, window), 506
    step(program, list(range(start)), 0, None)
    ids = [start + i for i in range(len(parents))]
    got = step(program, ids, start, parents)
    model, held = ReferenceModel.load(c.graph, Arrays(c.arrays)), {}
    with torch.inference_mode():
        for tokens, first, tree in ((list(range(start)), 0, None), (ids, start, parents)):
            depths = range(len(tokens)) if tree is None else tree_depths(tree)
            kv = KVState((SpanRows(0, 0, len(tokens), first, tree),), held, kv_dtype)
            positions = torch.tensor([first + d for d in depths])
            out = model(torch.tensor(tokens), positions, torch.arange(len(tokens)), kv)
    close(got, out["logits"].numpy(), TOLERANCES[kv_dtype])


@isas
@dtypes
def test_pages_below_a_window_are_not_there(isa: str, kv_dtype: str) -> None:
    """Their numbers lead to memory that nobody has: a read of one would end the process."""
    window, tokens, pages = 70, 1200, 75
    c = attention(tokens, 4, 2, 24, window)
    program = materialised(c, tokens, isa, kv_dtype, pages=pages)
    whole = run_cut(program, [tokens], np.arange(pages))
    start = 0
    for count in (500, 1, 33, 13, 653):
        program.ids[:count] = program.positions[:count] = np.arange(start, start + count)
        program.tables[:pages] = np.arange(pages)
        program.tables[: max(0, start + 1 - window) // 16] = -(1 << 31)
        program.spans[0] = (0, count, start, 0, -1)
        program.run(count, 1, 0, pages, sample=False)
        assert np.array_equal(program.value("logits", count), whole[start : start + count])
        start += count
    assert start == tokens


def test_the_plan_holds_the_scores_of_the_longest_step() -> None:
    """64 tokens of 4 heads over 128 keys, and statistics of a split beside each row."""
    c = attention(64, 4, 2, 16)
    plans = [make_cpu(c.graph, c.arrays, 64, isa="scalar", flash=flash).memory for flash in (True, False)]
    assert plans[1].workspace - plans[0].workspace == 64 * 4 * (128 * 4 + 64) - 64
    assert plans[1].arena == plans[0].arena
