"""Weight formats in the native kernels: odd groups, and the same bits for any rows, threads and shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.graph.ops.formats import round_activations, round_weight
from tests.numerics.harness import ISAS, OpGraph, make_cpu, run_cpu
from tests.numerics.test_cpu_ops import FORMATS, QUANTIZED, close, random

GROUPED = [(format, group) for format, group in QUANTIZED if group]
KINDS = {
    "zero": lambda w: np.zeros_like(w),
    "constant": lambda w: np.full_like(w, 0.3),
    "negative": lambda w: -np.abs(w),
    "positive": lambda w: np.abs(w) + 1,
    "one weight": lambda w: np.where(np.arange(w.shape[1]) == 20, w, 0),
    "tiny": lambda w: 1e-9 * w,  # below what fp16 scales can say
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "group"), GROUPED)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_groups(isa: str, format: str, group: int, kind: str) -> None:
    """Products and lookups follow the specification for each, in the narrow path and in the wide one."""
    g = OpGraph()
    m, n, k = 11, 19, 3 * group // 2 + 4
    x, w = random(m, k), KINDS[kind](random(n, k, seed=1)).astype(np.float32)
    w[n // 2] = random(k, seed=2)  # beside rows of the usual kind
    y = g.builder.linear(g.input("x", x), g.weight("w", w))
    graph = g.finish(y, formats={"w": (format, group)})
    rounded = round_weight(torch.from_numpy(w), format, group)
    want = (
        (round_activations(torch.from_numpy(x), format, group).double() @ rounded.double().T).float().numpy()
    )
    got = run_cpu(graph, g.arrays, m, isa=isa)
    close(got, want, 3e-6)
    assert np.array_equal(run_cpu(graph, g.arrays, 3, isa=isa), got[:3])

    table = OpGraph()
    y = table.builder.op("embed", "ids", weights=(table.weight("w", w),), scale=1.0)
    graph = table.finish(y, formats={"w": (format, group)})
    assert np.array_equal(run_cpu(graph, table.arrays, n, isa=isa), rounded.numpy())


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    stored=st.sampled_from(FORMATS),
    n=st.integers(1, 100),
    k=st.integers(1, 700),
    m=st.integers(1, 60),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_any_rows_of_a_batch_have_the_same_bits(
    isa: str, stored: tuple[str, int], n: int, k: int, m: int, threads: int, data: st.DataObject
) -> None:
    """Each row depends on itself alone: not on how many there are, where it stands, or who computes it."""
    g = OpGraph()
    x, w = random(m, k), random(n, k, seed=1)
    y = g.builder.linear(g.input("x", x), g.weight("w", w))
    graph = g.finish(y, formats={"w": stored})
    whole = run_cpu(graph, g.arrays, m, isa=isa)
    rows = data.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=m))
    program = make_cpu(graph, g.arrays, m, isa=isa, threads=threads)
    program.ids[: len(rows)] = rows
    program.spans[0] = (0, len(rows), 0, 0, -1)
    program.run(len(rows), 1, len(rows), 1, sample=False)
    assert np.array_equal(program.value("logits", len(rows)), whole[rows])
    rounded = round_weight(torch.from_numpy(w), *stored).double()
    seen = round_activations(torch.from_numpy(x), *stored).double()
    close(whole, (seen @ rounded.T).float().numpy(), 2e-5 if stored[0] == "bf16" else 5e-6)
