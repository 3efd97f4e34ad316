"""How one types what differs between two choices: "with --swap-bytes 1GiB", "without --dtype"."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from gossamer.config.continuous_batching import ContinuousBatching
from gossamer.config.dynamic_batching import DynamicBatching
from gossamer.config.mixed_precision import MixedPrecision
from gossamer.config.offloading import Offloading
from gossamer.config.speculative_decoding import SpeculativeDecoding
from gossamer.config.static_batching import StaticBatching

__all__ = ["typed"]

_OFF = {
    "paged_attention": "--no-paged-attention", "prefix_cache": "--no-enable-prefix-caching",
    "memory_reuse": "--no-memory-reuse", "operator_fusion": "--no-operator-fusion",
    "layer_fusion": "--no-layer-fusion", "sparse_weights": "--no-sparse-weights",
    "flash_attention": "--no-flash-attention", "dynamic_shapes": "--no-dynamic-shapes",
}  # fmt: skip
"""Techniques that are on unless a flag turns them off."""
_PARTS = {
    "page_size": "--page-size", "swap_bytes": "--swap-bytes", "swap_directory": "--swap-directory",
    "prefill_chunk": "--prefill-chunk", "preempt_by": "--preempt-by", "isa": "--isa (and $GOSSAMER_ISA)",
    "threads": "--threads",
    "itl_goal_ms": "--itl-goal-ms", "max_wait_ms": "--max-wait-ms",
}  # fmt: skip
"""Fields of techniques that have flags of their own."""
_SPELLED = {
    "mixed_precision": "--dtype",
    "speculative_decoding": "--speculative-config",
    "offloading": "--offload",
    "kv_dtype": "--kv-cache-dtype",
}


def typed(choice: str, before: Any, after: Any) -> list[str]:
    """What to type otherwise, so that a choice is `after` instead of `before`.

    choice: a field of EngineConfig, or "batching" for the two of which one is on; its values are tuples of
    continuous_batching and static_batching.
    """
    if choice == "batching":
        return list(_batching(before, after))
    if choice in _OFF:
        if after is None:
            return [f"with {_OFF[choice]}"]
        back = [f"without {_OFF[choice]}"] if before is None else []
        return back + list(_parts(type(after)() if before is None else before, after))
    if choice in ("hardware_kernels", "parallel_computing"):
        return list(_parts(before, after))
    if choice == "dynamic_batching":
        return [
            f"without {_PARTS[own.name]}"
            for own in fields(DynamicBatching)
            if getattr(before, own.name) is not None and getattr(after, own.name, None) is None
        ]
    flag = _SPELLED.get(choice, "--" + choice.replace("_", "-"))
    return [f"without {flag}" if after is None else f"with {flag} {_value(after)}"]


def _batching(before: Any, after: Any) -> Iterator[str]:
    (_, was_static), (continuous, static) = before, after
    if static is not None:
        # The flag turns the other off, so that only Python can have both.
        yield "with continuous_batching=None" if was_static else f"with --static-batching {_value(static)}"
        return
    if was_static is not None:
        yield "without --static-batching"
    elif before[0] is None:
        yield "with continuous_batching=ContinuousBatching()"
    yield from _parts(before[0] or ContinuousBatching(), continuous)


def _parts(before: Any, after: Any) -> Iterator[str]:
    for own in fields(after):
        old, new = getattr(before, own.name), getattr(after, own.name)
        if old == new or own.name not in _PARTS:
            continue
        flag = _PARTS[own.name]
        yield f"without {flag}" if new is None else f"with {flag.partition(' ')[0]} {_value(new)}"


def _value(value: Any) -> str:
    if isinstance(value, MixedPrecision):
        return {"bf16": "bfloat16", "f16": "float16"}[value.dtype]
    if isinstance(value, StaticBatching):
        return "padded" if value.padded else "ragged"
    if isinstance(value, Offloading):
        return "auto" if value.device_bytes is None else _value(value.device_bytes)
    if isinstance(value, SpeculativeDecoding):
        given = {own.name: getattr(value, own.name) for own in fields(value)}
        kept = {own.name: given[own.name] for own in fields(value) if given[own.name] != own.default}
        return f"'{json.dumps(kept, default=str)}'"
    if isinstance(value, int) and value and value % (1 << 20) == 0:
        return f"{value >> 30}GiB" if value % (1 << 30) == 0 else f"{value >> 20}MiB"
    return str(value)
