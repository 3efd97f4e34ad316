"""Sparse weights: matrices with enough zeros are stored without them (a bit for each number, then the rest).

The zeros come from pruning; what they are is known before (`gossamer.checkpoint.sparsity`), so that the bytes
of every matrix are planned before one is read.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from gossamer.config import EngineConfig
from gossamer.errors import ConfigError
from gossamer.graph.ir import SPARSE_FORMATS, Graph, Weight
from gossamer.passes.base import Pass
from gossamer.passes.weight_formats import matrices

__all__ = ["PASS", "sparse_weights"]


def sparse_weights(graph: Graph, config: EngineConfig) -> Graph:
    """Marks matrices whose share of zeros is large enough, and whose format can leave them out.

    Raises ConfigError where the user asked for it and a format cannot, there is no such matrix, or nobody
    counted the zeros.
    """
    asked = config.sparse_weights
    assert asked is not None
    shares = {name: _share(weight) for name, weight in matrices(graph).items() if weight.nonzeros}
    found = [graph.weights[name] for name, share in shares.items() if share >= asked.least]
    able = [weight for weight in found if (weight.format, weight.group) in SPARSE_FORMATS]
    if asked.count and len(able) < len(found):
        other = next(weight for weight in found if weight not in able)
        raise ConfigError(
            f"{other.name} is {100 * shares[other.name]:.0f} % zeros, and {other.stored} cannot leave them "
            "out; int8 (one scale per channel) and bf16 can: --quantization int8, --dtype bfloat16, or a "
            "--weight-format for it; or leave out --sparse-weights"
        )
    if asked.count and not shares:
        raise ConfigError(
            "nobody counted the zeros of this model: that takes its numbers, which were not read here; leave "
            "out --sparse-weights"
        )
    if asked.count and not able:
        most = max(shares, key=shares.__getitem__)
        raise ConfigError(
            f"no matrix is {100 * asked.least:.0f} % zeros ({most} has the most, {100 * shares[most]:.1f} "
            "%); prune the model, lower sparse_weights.least, or leave out --sparse-weights"
        )
    return replace(graph, weights={**graph.weights, **{w.name: replace(w, sparse=True) for w in able}})


def _share(weight: Weight) -> float:
    return 1.0 - sum(weight.nonzeros) / prod(weight.shape)


PASS = Pass(
    name="sparse_weights",
    wanted=lambda config: config.sparse_weights is not None,
    run=sparse_weights,
    after=("mixed_precision", "quantization"),
    before=("operator_fusion",),
)
