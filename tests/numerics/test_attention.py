"""Attention over pages of every KV format against the torch reference over the values that the format
stores, and bit for bit against itself however it is cut, on every instruction set of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.backends.cpu.program import CpuProgram
from gossamer.backends.reference.module import ReferenceModel
from gossamer.graph.ir import Graph, KVGroup
from gossamer.graph.ops.attention import KVState, SpanRows, tree_depths
from gossamer.graph.ops.formats import round_kv
from tests.numerics.harness import ISAS, Arrays, OpGraph, make_cpu, run_cpu, run_reference
from tests.numerics.test_cpu_ops import close, random

# What is left is the order of additions, and how probabilities are rounded.
TOLERANCES = {"f32": 5e-6, "f16": 5e-6, "bf16": 4e-3, "int8": 2e-3, "int4": 2e-3}
isas = pytest.mark.parametrize("isa", ISAS)
dtypes = pytest.mark.parametrize("kv_dtype", TOLERANCES)


@dataclass(frozen=True)
class Case:
    graph: Graph
    arrays: dict[str, np.ndarray]


@cache
def attention(
    tokens: int, heads: int, kv_heads: int, size: int, window: int | None = None, softcap: float | None = None
) -> Case:
    """One attention node over `tokens` random queries, keys and values."""
    g = OpGraph()
    q = g.input("q", 2 * random(tokens, heads * size))
    k, v = (g.input(name, random(tokens, kv_heads * size, seed=i + 1)) for i, name in enumerate("kv"))
    kv = g.builder.op("kv_write", k, v, layer=0, head_dim=size)
    out = g.builder.op(
        "attention", q, kv, layer=0, heads=heads, head_dim=size, scale=size**-0.5, window=window,
        softcap=softcap,
    )  # fmt: skip
    return Case(g.finish(out, (KVGroup("full", (0,), kv_heads, size, window),)), g.arrays)


@isas
@dtypes
@pytest.mark.parametrize("size", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1), (14, 2), (8, 1)])
def test_head_sizes_and_groups(isa: str, kv_dtype: str, size: int, heads: int, kv_heads: int) -> None:
    c = attention(70, heads, kv_heads, size)
    spans = ((0, 1, 0), (1, 50, 0), (51, 19, 0))
    tables = [[6], [3, 0, 5, 1], [2, 7]]
    got = run_cpu(c.graph, c.arrays, 70, isa=isa, spans=spans, tables=tables, pages=8, kv_dtype=kv_dtype)
    close(
        got,
        run_reference(c.graph, c.arrays, 70, spans=spans, kv_dtype=kv_dtype),
        TOLERANCES[kv_dtype],
    )


@isas
@dtypes
@pytest.mark.parametrize("window", [None, 1, 20, 600])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_long_windowed_and_capped(isa: str, kv_dtype: str, window: int | None, softcap: float | None) -> None:
    tokens = 1100  # more than two splits of keys
    c = attention(tokens, 2, 1, 16, window, softcap)
    got = run_cpu(c.graph, c.arrays, tokens, isa=isa, pages=70, kv_dtype=kv_dtype)
    want = run_reference(c.graph, c.arrays, tokens, kv_dtype=kv_dtype)
    close(got, want, TOLERANCES[kv_dtype])


@isas
@dtypes
def test_an_empty_span_beside_others(isa: str, kv_dtype: str) -> None:
    c = attention(70, 4, 4, 8)
    alone = run_cpu(c.graph, c.arrays, 5, isa=isa, pages=4, kv_dtype=kv_dtype)
    got = run_cpu(
        c.graph, c.arrays, 5, isa=isa, pages=4, kv_dtype=kv_dtype,
        spans=((0, 0, 0), (0, 5, 0), (5, 0, 3)), tables=[[1], [0], [2]],
    )  # fmt: skip
    assert np.array_equal(got, alone)


def run_cut(program: CpuProgram, chunks: list[int], table: np.ndarray, poison: bool = True) -> np.ndarray:
    """All tokens in one sequence, in chunks, over slots that held NaN in every format."""
    if poison:
        for pool in program.kv:
            pool[:] = 0xFF
    rows, start = [], 0
    program.tables[: len(table)] = table
    for count in chunks:
        program.ids[:count] = np.arange(start, start + count)
        program.positions[:count] = np.arange(start, start + count)
        program.spans[0] = (0, count, start, 0, -1)
        program.run(count, 1, 0, len(table), sample=False)
        rows.append(program.value("logits", count).copy())
        start += count
    return np.concatenate(rows)


@isas
@dtypes
@pytest.mark.parametrize("window", [None, 300])
def test_same_bits_however_it_is_cut(isa: str, kv_dtype: str, window: int | None) -> None:
    """Chunks, page sizes, page order, threads and what a page held before leave every bit alone."""
    tokens = 700
    c = attention(tokens, 4, 2, 24, window)
    whole = run_cpu(c.graph, c.arrays, tokens, isa=isa, pages=64, kv_dtype=kv_dtype)
    for page_size, pages, threads, chunk in (
        (32, 24, 1, 700),
        (112, 7, 2, 97),
        (16, 44, 2, 33),
        (704, 1, 1, 250),
    ):
        program = make_cpu(
            c.graph, c.arrays, tokens, isa=isa, threads=threads, page_size=page_size, pages=pages,
            kv_dtype=kv_dtype,
        )  # fmt: skip
        table = np.random.default_rng(page_size).permutation(pages)
        chunks = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
        assert np.array_equal(run_cut(program, chunks, table), whole), (page_size, chunk)


@cache
def cut_program(isa: str, kv_dtype: str, window: int | None) -> tuple[CpuProgram, np.ndarray]:
    c = attention(560, 6, 2, 8, window)
    program = make_cpu(c.graph, c.arrays, 560, isa=isa, pages=36, kv_dtype=kv_dtype)
    return program, run_cut(program, [560], np.arange(36))


@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    kv_dtype=st.sampled_from(list(TOLERANCES)),
    window=st.sampled_from([None, 70]),
    cuts=st.sets(st.integers(1, 559), max_size=8),
    order=st.permutations(range(36)),
)
def test_any_cut_gives_the_same_bits(
    isa: str, kv_dtype: str, window: int | None, cuts: set[int], order: list[int]
) -> None:
    program, whole = cut_program(isa, kv_dtype, window)
    edges = [0, *sorted(cuts), 560]
    chunks = [b - a for a, b in pairwise(edges)]
    assert np.array_equal(run_cut(program, chunks, np.array(order)), whole)


@isas
@dtypes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_shows_where_it_is_seen(isa: str, kv_dtype: str, bad: float) -> None:
    """Rows before it keep every bit, rows that see it do not look sound, alone or together."""
    tokens, at = 60, 37
    c = attention(tokens, 4, 2, 24)
    clean = run_cpu(c.graph, c.arrays, tokens, isa=isa, kv_dtype=kv_dtype)
    for name in "kv":
        arrays = {n: a.copy() for n, a in c.arrays.items()}
        arrays[name][at, 5] = bad
        got = run_cpu(c.graph, arrays, tokens, isa=isa, kv_dtype=kv_dtype)
        assert np.array_equal(got[:at], clean[:at])
        if name == "v":
            assert not np.isfinite(got[at:]).all(1).any()
        program = make_cpu(c.graph, arrays, tokens, isa=isa, kv_dtype=kv_dtype)
        assert np.array_equal(run_cut(program, [1] * tokens, np.arange(8)), got, equal_nan=True)


@dtypes
def test_pages_hold_what_the_specification_says(kv_dtype: str) -> None:
    """A query of zeros averages the values that its row sees: the first row's is the stored one."""
    c = attention(33, 2, 2, 24)
    arrays = {**c.arrays, "q": np.zeros_like(c.arrays["q"])}
    stored = round_kv(torch.from_numpy(arrays["v"]).view(33, 2, 24), kv_dtype).view(33, -1).numpy()
    for isa in ISAS:
        got = run_cpu(c.graph, arrays, 33, isa=isa, kv_dtype=kv_dtype)
        close(got[:1], stored[:1], 1e-6)
        close(got[32:], stored.mean(0, keepdims=True), 2e-4)


# ---- trees ---------------------------------------------------------------------------------------

START = 500  # so that a tree of 40 crosses a split of 512


def path_of(parents: tuple[int, ...], token: int) -> list[int]:
    path = []
    while token >= 0:
        path.append(token)
        token = parents[token]
    return path[::-1]


def step(program: CpuProgram, ids: list[int], start: int, parents: tuple[int, ...] | None) -> np.ndarray:
    count = len(ids)
    depths = range(count) if parents is None else tree_depths(parents)
    program.ids[:count] = ids
    program.positions[:count] = [start + d for d in depths]
    program.spans[0] = (0, count, start, 0, -1 if parents is None else 0)
    if parents is not None:
        program.parents[:count] = parents
    program.run(count, 1, 0, program.shape.table, sample=False)
    return program.value("logits", count).copy()


@cache
def tree_program(isa: str, kv_dtype: str, window: int | None) -> CpuProgram:
    c = attention(600, 6, 2, 24, window)
    program = make_cpu(c.graph, c.arrays, 600, isa=isa, pages=38, kv_dtype=kv_dtype)
    program.tables[:38] = np.random.default_rng(1).permutation(38)
    return program


trees = st.lists(st.integers(0, 1 << 30), min_size=1, max_size=40).map(
    lambda draws: tuple(draw % (i + 1) - 1 for i, draw in enumerate(draws))
)


@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    kv_dtype=st.sampled_from(list(TOLERANCES)),
    window=st.sampled_from([None, 5, 70]),
    start=st.sampled_from([0, 1, 16, 47, START]),
    parents=trees,
)
def test_a_path_of_a_tree_has_the_bits_of_a_chain(
    isa: str, kv_dtype: str, window: int | None, start: int, parents: tuple[int, ...]
) -> None:
    program = tree_program(isa, kv_dtype, window)
    for pool in program.kv:
        pool[:] = 0xFF
    if start:
        step(program, list(range(start)), 0, None)
    ids = [start + i for i in range(len(parents))]
    together = step(program, ids, start, parents)
    leaves = set(range(len(parents))) - set(parents)
    for leaf in leaves:
        path = path_of(parents, leaf)
        for pool in program.kv:  # what the tree left behind must not matter
            pool[:] = 0xFF
        if start:
            step(program, list(range(start)), 0, None)
        chain = step(program, [start + t for t in path], start, None)
        assert np.array_equal(together[path], chain)


@isas
@dtypes
@pytest.mark.parametrize("window", [None, 5, 70])
def test_trees_against_the_reference(isa: str, kv_dtype: str, window: int | None) -> None:
    parents = (-1, 0, 0, 1, 1, -1, 5, 6, 3, 8, 2)
    c = attention(600, 6, 2, 24, window)
    program = tree_program(isa, kv_dtype, window)
    step(program, list(range(START)), 0, None)
    ids = [START + i for i in range(len(parents))]
    got = step(program, ids, START, parents)
    model, held = ReferenceModel.load(c.graph, Arrays(c.arrays)), {}
    with torch.inference_mode():
        for tokens, start, tree in ((list(range(START)), 0, None), (ids, START, parents)):
            depths = range(len(tokens)) if tree is None else tree_depths(tree)
            kv = KVState((SpanRows(0, 0, len(tokens), start, tree),), held, kv_dtype)
            positions = torch.tensor([start + d for d in depths])
            out = model(torch.tensor(tokens), positions, torch.arange(len(tokens)), kv)
    close(got, out["logits"].numpy(), TOLERANCES[kv_dtype])


def compact(program: CpuProgram, table: np.ndarray, start: int, path: list[int]) -> None:
    """Moves the slots of a path together, as the executor is told to after a draft: runs within two pages."""
    size = program.shape.page_size
    for depth, token in enumerate(path):
        if depth != token:
            (s_page, s_slot), (t_page, t_slot) = divmod(start + token, size), divmod(start + depth, size)
            program.copy_tokens(0, int(table[s_page]), s_slot, int(table[t_page]), t_slot, 1)


@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    kv_dtype=st.sampled_from(list(TOLERANCES)),
    window=st.sampled_from([None, 5, 70]),
    start=st.sampled_from([1, 15, 47, START]),
    parents=trees,
    data=st.data(),
)
def test_a_path_moved_together_serves_as_a_chain(
    isa: str, kv_dtype: str, window: int | None, start: int, parents: tuple[int, ...], data: st.DataObject
) -> None:
    program = tree_program(isa, kv_dtype, window)
    path = path_of(parents, data.draw(st.integers(0, len(parents) - 1)))
    after = list(range(560, 563))
    chain, moved = [], []
    for found in (chain, moved):
        for pool in program.kv:
            pool[:] = 0xFF
        step(program, list(range(start)), 0, None)
        if found is chain:
            step(program, [start + t for t in path], start, None)
        else:
            step(program, [start + t for t in range(len(parents))], start, parents)
            compact(program, program.tables[:38], start, path)
        found.append(step(program, after, start + len(path), None))
    assert np.array_equal(chain[0], moved[0])


@isas
@dtypes
@pytest.mark.parametrize(("page_size", "size"), [(16, 24), (48, 8), (32, 80)])
def test_any_run_of_tokens_can_be_copied(isa: str, kv_dtype: str, page_size: int, size: int) -> None:
    """To another page, and within one to lower slots: as if written there; the rest keeps every bit."""
    program = make_cpu(
        attention(page_size, 2, 2, size).graph, attention(page_size, 2, 2, size).arrays, page_size, isa=isa,
        page_size=page_size, pages=3, kv_dtype=kv_dtype,
    )  # fmt: skip
    rng = np.random.default_rng(page_size)
    (pool,) = program.kv

    def written(rows: np.ndarray, page: int) -> np.ndarray:
        """The page after tokens `rows` were written to its slots."""
        pool[:, page] = 0xA5
        program.tables[0] = page
        for slot, row in enumerate(rows):
            program.ids[0], program.positions[0] = row, slot
            program.spans[0] = (0, 1, slot, 0, -1)
            program.run(1, 1, 0, 3, sample=False)
        return pool[:, page].copy()

    order = np.arange(page_size)
    for _ in range(12):
        tokens = int(rng.integers(0, page_size + 1))
        source, target = (int(rng.integers(0, page_size - tokens + 1)) for _ in range(2))
        mine, other = rng.permutation(order), rng.permutation(order)
        want = other.copy()
        want[target : target + tokens] = mine[source : source + tokens]
        wanted = written(want, 2)
        written(mine, 0), written(other, 1)
        program.copy_tokens(0, 0, source, 1, target, tokens)
        assert np.array_equal(pool[:, 1], wanted)
        source, target = max(source, target), min(source, target)
        want = mine.copy()
        want[target : target + tokens] = mine[source : source + tokens]
        wanted = written(want, 2)
        program.copy_tokens(0, 0, source, 0, target, tokens)
        assert np.array_equal(pool[:, 0], wanted)


@isas
@dtypes
@pytest.mark.parametrize("page_size", [16, 48])
def test_pages_below_a_window_are_not_there(isa: str, kv_dtype: str, page_size: int) -> None:
    """Their numbers lead to memory that nobody has: a read of one would end the process."""
    window, tokens = 70, 1200
    c = attention(tokens, 4, 2, 24, window)
    pages = -(-tokens // page_size)
    program = make_cpu(
        c.graph, c.arrays, tokens, isa=isa, page_size=page_size, pages=pages, kv_dtype=kv_dtype
    )
    whole = run_cut(program, [tokens], np.arange(pages))
    start = 0
    for count in (500, 1, 1, 5, 33, 13, 32, 400, 200, 1, 14):
        program.ids[:count] = program.positions[:count] = np.arange(start, start + count)
        program.tables[:pages] = np.arange(pages)
        program.tables[: max(0, start + 1 - window) // page_size] = -(1 << 31)
        program.spans[0] = (0, count, start, 0, -1)
        program.run(count, 1, 0, pages, sample=False)
        assert np.array_equal(program.value("logits", count), whole[start : start + count])
        start += count
    assert start == tokens
    parents = (-1, 0, 0, 1, -1, 4)  # in place of the last slots
    at = tokens - len(parents)
    program.tables[: max(0, at + 1 - window) // page_size] = -(1 << 31)
    tree = step(program, list(range(at, tokens)), at, parents)
    assert np.array_equal(tree[0], whole[at])
