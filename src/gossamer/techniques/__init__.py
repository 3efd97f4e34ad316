"""The handbook's techniques, one card each: what is promised, what exists here, how it is switched.

`CARDS` has them in the handbook's order; `card(name)` finds one.
"""

from __future__ import annotations

from difflib import get_close_matches

from gossamer.errors import ConfigError
from gossamer.techniques import (
    continuous_batching,
    distillation,
    dynamic_batching,
    dynamic_shapes,
    flash_attention,
    hardware_kernels,
    layer_fusion,
    memory_reuse,
    mixed_precision,
    offloading,
    operator_fusion,
    paged_attention,
    parallel_computing,
    pruning,
    quantization,
    sequence_parallelism,
    speculative_decoding,
)
from gossamer.techniques.card import METRICS, Card, Metric

__all__ = ["CARDS", "METRICS", "Card", "Metric", "card"]

CARDS: tuple[Card, ...] = tuple(
    module.CARD
    for module in (
        quantization, pruning, distillation,
        operator_fusion, layer_fusion, dynamic_shapes,
        paged_attention, offloading, memory_reuse,
        continuous_batching, dynamic_batching, parallel_computing,
        mixed_precision, hardware_kernels, flash_attention,
        sequence_parallelism, speculative_decoding,
    )
)  # fmt: skip
"""In the handbook's order."""


def card(name: str) -> Card:
    """The card of that name or row, "paged_attention", "paged-attention" or "3.1". Raises ConfigError."""
    wanted = _plain(name)
    for found in CARDS:
        if wanted in (found.name, found.row, _plain(found.title)):
            return found
    names = [found.name for found in CARDS]
    near = get_close_matches(wanted, names, 1) or [each for each in names if wanted and wanted in each]
    raise ConfigError(
        f"there is no technique {name!r}; "
        + (f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}")
    )


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")
