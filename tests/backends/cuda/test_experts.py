"""Experts of every format against the op's reference over the values that the formats stand for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from gossamer.backends.cuda.kernels.experts import experts, sort_by_expert
from gossamer.backends.cuda.packing import pack
from gossamer.graph.ops import get_op
from gossamer.graph.ops.attention import KVState
from gossamer.graph.ops.formats import round_weight
from gossamer.graph.weights import Stack, Tensor
from tests.numerics.harness import Arrays, OpGraph

FORMATS = [
    ("f32", 0),
    ("bf16", 0),
    ("f16", 0),
    ("int8", 0),
    ("int8", 32),
    ("int4", 32),
    ("uint4", 32),
    ("nf4", 64),
]


@pytest.mark.parametrize("t", [1, 7, 40])
@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_experts(format: str, group: int, t: int, device: torch.device) -> None:
    count, width, size, chosen = 5, 35, 70, 2
    random = np.random.default_rng(t)
    g = OpGraph()
    x_in = g.input("x", random.standard_normal((3, size)).astype(np.float32))
    values: list[torch.Tensor] = []
    names: list[str] = []
    for name, shape in (("gate", (width, size)), ("up", (width, size)), ("down", (size, width))):
        planes = random.standard_normal((count, *shape)).astype(np.float32)
        g.arrays |= {f"{name}{i}": plane for i, plane in enumerate(planes)}
        names.append(g.builder.weight(name, Stack(tuple(Tensor(f"{name}{i}", shape) for i in range(count)))))
        values.append(round_weight(torch.from_numpy(planes), format, group).double().to(device))
    router = g.builder.linear(x_in, g.weight("router", np.zeros((count, size), np.float32)))
    routed = g.builder.ops("top_k_experts", router, k=chosen, renormalise=True)
    y = g.builder.op("experts", x_in, *routed, weights=tuple(names), act="silu")
    packed = pack(g.finish(y, formats=dict.fromkeys(names, (format, group))), Arrays(g.arrays), device)
    # Expert 3 gets no token; a token's slots may come in any order.
    drawn = [random.permutation([0, 1, 2, 4])[:chosen] for _ in range(t)]
    ids = torch.from_numpy(np.stack(drawn).astype(np.int32)).to(device)
    gains = torch.rand(t, chosen).to(device)
    dtype = torch.bfloat16 if format == "bf16" else torch.float32
    x = torch.randn(t, size).to(device, dtype)
    (want,) = get_op("experts").reference(
        {"act": "silu"}, [x.double(), ids, gains.double()], values, KVState(())
    )
    weights = (packed["gate"], packed["up"], packed["down"])
    out = torch.full((t, size), torch.nan, device=device)
    assert experts(out, x, ids, gains, weights, act="silu") == f"experts_{weights[0].stored}"
    bound = 2e-2 if dtype == torch.bfloat16 else 2e-3 if x.is_cuda else 2e-5
    assert (out.double() - want).abs().max() <= bound * want.abs().max()
    residual = out.clone()
    experts(residual, x, ids, gains, weights, act="silu", residual=residual)
    assert torch.allclose(residual, 2 * out)


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("t", [1, 3, 50])
def test_every_slot_is_in_one_block_of_its_expert(t: int, block: int, device: torch.device) -> None:
    ids = torch.randint(0, 6, (t, 3), generator=torch.Generator().manual_seed(t)).to(device)
    routes = sort_by_expert(ids, 8, block)
    flat, seen = ids.flatten().tolist(), []
    starts, order = routes.starts.tolist(), routes.order.tolist()
    for expert, first in zip(routes.block_experts.tolist(), routes.block_firsts.tolist()):
        if expert < 8:
            stop = min(first + block, starts[expert + 1])
            assert first < stop
            assert all(flat[slot] == expert for slot in order[first:stop])
            seen += order[first:stop]
    assert sorted(seen) == list(range(3 * t))
    assert all(a < b or flat[a] != flat[b] for a, b in pairwise(order))
