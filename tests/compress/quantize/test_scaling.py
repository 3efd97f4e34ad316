"""Factors that move between weights leave every family's logits as they were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.weights import DummySource
from gossamer.compress.quantize.scaling import Scaling, scale, scalings
from gossamer.graph.ir import Graph
from tests.compress.test_blocks import graph_of
from tests.families.configs import CASES

IDS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))


def all_scalings(graph: Graph) -> list[Scaling]:
    return [found for block in graph.blocks() for found in scalings(graph, block)]


@pytest.mark.parametrize("family", sorted(CASES))
@torch.inference_mode()
def test_logits_stay_as_they_were(family: str) -> None:
    graph = graph_of(family)
    model = ReferenceModel.load(graph, DummySource(graph))
    before = model.logits(IDS)
    for i, scaling in enumerate(all_scalings(graph)):
        factors = torch.randn(scaling.size, generator=torch.Generator().manual_seed(i)).exp()
        weights = {p.weight: model.weight(p.weight).clone() for p in (*scaling.divided, *scaling.multiplied)}
        scale(model, scaling, factors)
        for name, old in weights.items():
            assert not torch.allclose(model.weight(name), old), "a scaling that changes nothing"
    torch.testing.assert_close(model.logits(IDS), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(CASES))
def test_every_layer_has_its_scalings(family: str) -> None:
    graph = graph_of(family)
    kinds = [s.kind for s in all_scalings(graph)]
    assert kinds.count("norm") == 2 * graph.layers
    assert kinds.count("value") == kinds.count("key") == graph.layers
    experts = [graph.weights[n.weights[0]].shape[0] for n in graph.nodes if n.op == "experts"]
    dense = sum(n.op == "act_mul" for n in graph.nodes)
    assert kinds.count("up") == sum(experts) + dense
    assert dense + len(experts) == (0 if family.startswith("gpt2") else graph.layers)


@pytest.mark.parametrize("family", sorted(CASES))
def test_places_lie_in_their_block(family: str) -> None:
    graph = graph_of(family)
    for block in graph.blocks():
        inside = {w for node in block.nodes for w in node.weights}
        for scaling in scalings(graph, block):
            assert {p.weight for p in (*scaling.divided, *scaling.multiplied)} <= inside


def test_channels_that_turn_together_have_one_factor() -> None:
    (key,) = [s for s in all_scalings(graph_of("phi3")) if s.kind == "key"][:1]
    (rows,) = key.divided  # heads of 8, of which 6 channels turn: (0, 3), (1, 4), (2, 5); 6 and 7 do not
    assert rows.factor is not None
    assert rows.factor[:8] == (0, 1, 2, 0, 1, 2, 3, 4)
    assert key.size == 2 * 5


def test_a_tap_on_a_value_forbids_scaling_it() -> None:
    graph = graph_of("llama")
    block = next(graph.blocks())
    (norm,) = [s for s in scalings(graph, block) if s.kind == "norm"]
    tapped = replace(graph, outputs={**graph.outputs, "tap": norm.value})
    assert not [s for s in scalings(tapped, block) if s.kind == "norm"]
