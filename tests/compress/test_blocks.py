"""Walking a model block by block gives what the whole model gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.weights import DummySource
from gossamer.compress.blocks import Blocks, Site
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph
from gossamer.graph.ops.attention import KVState, SpanRows
from tests.families.configs import BARE, CASES

WINDOWS = np.random.default_rng(0).integers(0, 64, (3, 16)).astype(np.int32)


def architecture(config: Any) -> str:
    return next(name for name, (kind, _) in BARE.items() if type(config) is kind)


def graph_of(case: str) -> Graph:
    config = CASES[case].config()
    return build_graph({**config.to_dict(), "architectures": [architecture(config)]})


@pytest.mark.parametrize("family", sorted(CASES))
def test_a_walk_gives_the_models_hidden_states(family: str) -> None:
    graph = graph_of(family)
    source = DummySource(graph)
    walk = Blocks(graph, source, WINDOWS)
    scopes = [block.scope for block in walk]
    assert len(scopes) == len(walk) == len(set(scopes))
    model = ReferenceModel.load(graph, source)
    last = list(graph.blocks())[-1].outputs[0]
    with torch.inference_mode():
        spans = tuple(SpanRows(b, b * 16, 16, 0) for b in range(3))
        rows = torch.arange(48)
        ids = torch.from_numpy(WINDOWS.astype(np.int64)).flatten()
        whole = model(ids, rows % 16, rows, KVState(spans), (last,))[last]
    torch.testing.assert_close(walk.hidden, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", sorted(CASES))
def test_every_matrix_of_a_block_is_seen_with_its_inputs(family: str) -> None:
    graph = graph_of(family)
    source = DummySource(graph)
    seen: dict[tuple[str, int | None], int] = {}

    def observe(site: Site, x: torch.Tensor) -> None:
        for name in site.matrices:
            assert graph.weights[name].shape[-1] == x.shape[1]
            seen[name, site.plane] = seen.get((name, site.plane), 0) + x.shape[0]

    for block in Blocks(graph, source, WINDOWS):
        block.inputs(observe)
    plain = {name for name, plane in seen if plane is None}
    wanted = {
        n.weights[0] for n in graph.nodes if n.op == "linear" and n.scope and "router" not in n.weights[0]
    }
    assert plain == wanted
    assert all(count == 48 for (_, plane), count in seen.items() if plane is None)


def test_changed_weights_reach_the_blocks_behind() -> None:
    graph = graph_of("llama")
    source = DummySource(graph)
    plain = Blocks(graph, source, WINDOWS)
    list(plain)
    changed = Blocks(graph, source, WINDOWS)
    for i, block in enumerate(changed):
        if i == 0:
            for site in block.sites():
                for name in site.matrices:
                    block.matrix(name, site.plane).zero_()
    assert not torch.allclose(plain.hidden, changed.hidden)
