"""Times of steps on a GPU at most as fast as its limits allow (the roofline: Williams et al., 2009): every op
waits for its bytes or multiplies, whichever is longer.

It is a bound to hold measurements against, not a forecast: kernels are taken to reach the probed limits, what
an op writes and the next reads counts once each way, in two bytes a number, and quantized weights multiply in
bf16 where no kernel multiplies integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gossamer.backends.cuda.rates import GpuRates
from gossamer.graph.ir import Graph, Node, Shape
from gossamer.graph.ops.base import node_cost, weight_bytes
from gossamer.graph.ops.fused import LINEAR_OPS, matrix_weights

__all__ = ["GpuStep", "gpu_step"]

Spans = Sequence[tuple[int, int, int]]
"""Equal sequences of a step: (how many, tokens that each has computed before, tokens of each in it)."""

_KV_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0}
_NUMBER = 2.0  # bytes of a number between ops
_OWN = {"f32", "f16", "fp8"}  # formats that multiply in themselves; others in bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStep:
    """seconds: of the kernels, one after another; launch_seconds: that launching them one by one takes, which
    is the longer of the two where nothing is recorded. bytes: read and written; macs: multiply-accumulates,
    attention's among them."""

    seconds: float
    launch_seconds: float
    bytes: float
    macs: float

    def without_recording(self) -> float:
        """Seconds of the step where every kernel is launched by itself."""
        return max(self.seconds, self.launch_seconds)


def gpu_step(
    graph: Graph, rates: GpuRates, spans: Spans, rows: int, kv_dtype: str, *, streamed: int = 0
) -> GpuStep:
    """One step of a graph after its passes. rows: tokens that are sampled; streamed: bytes of weights that
    come from host memory meanwhile."""
    tokens = sum(count * new for count, _, new in spans)
    counts = {"1": 1.0, "T": float(tokens), "R": float(rows), "S": float(sum(n for n, _, _ in spans))}
    seconds = size = macs = 0.0
    for node in graph.nodes:
        moved = sum(_traffic(graph, node, counts, spans, tokens, kv_dtype))
        pairs = {"A": _pairs(spans, node.attrs.get("window"))} if node.op == "attention" else {}
        amount = node_cost(graph, node).flops
        multiplied = sum(factor * {**counts, **pairs}.get(dim, 0.0) for dim, factor in amount.items()) / 2
        rate = rates.tflops[_kind(graph, node, rates)] * 1e12 / 2
        multiplies = node.op in LINEAR_OPS or node.op in ("attention", "experts")
        seconds += max(moved / (rates.copy_gb_s * 1e9), multiplied / rate if multiplies else 0.0)
        size += moved
        macs += multiplied if multiplies else 0.0
    seconds = max(seconds, streamed / (rates.to_device_gb_s * 1e9))
    return GpuStep(
        seconds=seconds, launch_seconds=len(graph.nodes) * rates.launch_us * 1e-6, bytes=size, macs=macs
    )


def _traffic(
    graph: Graph, node: Node, counts: dict[str, float], spans: Spans, tokens: int, kv_dtype: str
) -> Iterator[float]:
    """Bytes of weights, of keys and values, and of what comes in and goes out."""
    weights = [graph.weights[name] for name in node.weights]
    if node.op == "embed":
        yield tokens * weight_bytes(weights[0]) / weights[0].shape[0]
    elif node.op == "experts":
        experts = weights[0].shape[0]
        chosen = graph.values[node.inputs[1]].shape[1]
        assert isinstance(chosen, int)
        touched = 1.0 - (1.0 - chosen / experts) ** tokens  # each token chooses at random
        yield touched * sum(map(weight_bytes, weights))
    else:
        yield sum(map(weight_bytes, weights))
    if node.op == "attention":
        _, group = graph.group_of(node.attrs["layer"])
        each = 2 * group.kv_heads * (group.head_dim * _KV_BYTES[kv_dtype] + 4.0 * (_KV_BYTES[kv_dtype] == 1))
        seen = sum(n * min(before + new, _window(node) + new - 1) for n, before, new in spans)
        yield each * seen
    for name in (*node.inputs, *node.outputs):
        value = graph.values[name]
        if value.dtype != "kv":
            yield _NUMBER * _numbers(value.shape, counts)


def _numbers(shape: Shape, counts: dict[str, float]) -> float:
    found = 1.0
    for extent in shape:
        found *= extent if isinstance(extent, int) else counts[extent.name]
    return found


def _window(node: Node) -> int:
    return node.attrs["window"] or 1 << 40


def _pairs(spans: Spans, window: int | None) -> float:
    """Query-key pairs: a token sees those before it, and itself, within the window."""
    most, found = window or 1 << 40, 0
    for count, before, new in spans:
        short = max(0, min(new, most - before))  # tokens that see all there is
        found += count * (short * before + short * (short + 1) // 2 + (new - short) * most)
    return float(found)


def _kind(graph: Graph, node: Node, rates: GpuRates) -> str:
    """The type in which an op multiplies: of the rates there are."""
    if node.op not in LINEAR_OPS:
        return "bf16"
    weight = graph.weights[matrix_weights(node)[0]]
    if weight.format == "int8" and not weight.group:
        return "int8"
    kind = weight.format if weight.format in _OWN else "bf16"
    return kind if kind in rates.tflops else "bf16"
