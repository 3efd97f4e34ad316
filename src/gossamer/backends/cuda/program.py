"""A graph compiled for a GPU: kernels over an arena, pages of keys and values, and packed weights, all of it
in device memory that is taken at start. Steps come in and results go out through arrays on the host.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from gossamer.backends.base import MemoryReport, Program, ReceiptLine
from gossamer.backends.cpu.budget import too_large
from gossamer.backends.cpu.plan import SAMPLE_ROW, StepShape, step_arrays
from gossamer.backends.cuda.device import Device
from gossamer.backends.cuda.inputs import StepInputs
from gossamer.backends.cuda.kernels.attention import require_heads, scratch_bytes
from gossamer.backends.cuda.kernels.attention_pages import Heads
from gossamer.backends.cuda.kernels.embed import name_tokens
from gossamer.backends.cuda.kernels.kv_copy import Move, copy_tokens
from gossamer.backends.cuda.kernels.sampling import DeviceSampler
from gossamer.backends.cuda.lower import Instruction, Lowering, Step, lower
from gossamer.backends.cuda.packing import PackedWeight, pack, packed_bytes
from gossamer.backends.cuda.replay import Recorder, buckets
from gossamer.backends.cuda.step import KvLayer
from gossamer.backends.cuda.streaming import StreamPlan, WeightStream
from gossamer.backends.cuda.temporary import temporary_bytes
from gossamer.backends.cuda.transfer import Arrival, Moment
from gossamer.backends.cuda.values import Quantized, plan_values, views
from gossamer.checkpoint.weights import WeightSource
from gossamer.errors import ConfigError, MemoryBudgetError
from gossamer.graph.ir import Graph, KVGroup
from gossamer.graph.ops.fused import LINEAR_OPS, matrix_weights

__all__ = ["CudaProgram", "Flight", "page_bytes", "plan_memory", "require"]

_KV = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip
_SCALED_KV = ("int8", "fp8")
_PLAIN = {"temperature": 1, "top_p": 1, "repetition": 1, "logprobs": -1, "mask_row": -1, "target": -1}
_ASKED = (
    _PLAIN,
    _PLAIN | {"top_p": 0.9},
    _PLAIN | {"repetition": 1.1},
    _PLAIN | {"logprobs": 1},
    _PLAIN | {"repetition": 1.1, "logprobs": 1},
)
"""Rows that between them take every path of the sampler."""
_RESULTS = ("token", "bad", "logprob", "top_ids", "top_logprobs")


@dataclass(slots=True)
class _Ran:
    calls: int = 0
    rows: int = 0
    seconds: float = 0.0
    kernels: dict[str, None] = field(default_factory=dict)


def plan_memory(
    graph: Graph, shape: StepShape, *, reuse: bool = True, streams: StreamPlan | None = None
) -> MemoryReport:
    """Bytes of device memory that a program of this shape takes, exactly, before any is taken. streams: which
    weights are not kept on the device. Raises ConfigError and NotBuiltError for formats that no kernel
    reads and heads that none takes."""
    if shape.kv_dtype not in _KV:
        raise ConfigError(
            f"the cuda backend stores keys and values in {', '.join(_KV)}, not in {shape.kv_dtype}; "
            "--kv-cache-dtype int8 is nearest"
        )
    arena = plan_values(graph, shape.tokens, shape.rows, reuse=reuse)
    shared = arena if reuse else plan_values(graph, shape.tokens, shape.rows, reuse=True)
    return MemoryReport(
        weights=_weight_bytes(graph) if streams is None else streams.device_bytes,
        kv=shape.pages * sum(page_bytes(graph, shape)),
        kv_tokens=shape.pages * shape.page_size,
        arena=arena.bytes,
        arena_separate=arena.separate,
        arena_shared=shared.bytes,
        workspace=_scratch(graph, shape)
        + _quantized_bytes(graph, shape)
        + 4 * StepInputs.words(shape, len(graph.kv_groups))
        + DeviceSampler(torch.device("meta"), shape.rows, graph.vocab).bytes
        + temporary_bytes(graph, shape, recorded=_most_recorded(shape)),
        host=0 if streams is None else streams.host_bytes,
    )


def require(memory: MemoryReport, graph: Graph, shape: StepShape, device: Device, budget: int | None) -> None:
    """Raises MemoryBudgetError, with what would fit, where the device (or a budget within it, in bytes) does
    not hold a program."""
    there = device.memory if budget is None else min(device.memory, budget)
    if memory.total > there:
        m = memory
        parts = {"weights": m.weights, "kv": m.kv, "arena": m.arena, "workspace": m.workspace}
        beside = {"draft": m.draft} if m.draft else {}
        where = f" on {device.name}"
        error = too_large(
            there, graph, shape, parts | beside, flash=True, weight_bytes=_weight_bytes, where=where
        )
        raise MemoryBudgetError(
            f"{error}; or let --offload auto stream from host memory the weights that do not fit"
        )


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched: how many rows it samples, and what comes back of them."""

    rows: int
    arrival: Arrival


class CudaProgram(Program):
    """One program with its memory. `run` is `launch`, which takes the step's arrays to the device and leaves
    kernels running there, and `land`, which brings back what was sampled."""

    def __init__(
        self,
        graph: Graph,
        source: WeightSource,
        shape: StepShape,
        device: Device,
        *,
        reuse: bool = True,
        recorded: bool = True,
        streams: StreamPlan | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """recorded: decode steps are recorded and replayed, see `replay.py`. streams: which weights are not
        kept on the device, see `streaming.py`. Takes its memory whether or not there is enough: `require`
        asks first."""
        self.memory = plan_memory(graph, shape, reuse=reuse, streams=streams)
        self.graph, self.shape, self.device = graph, shape, device
        self.isa, self.threads = device.isa, 1
        at = device.torch
        stream = None if streams is None else WeightStream(streams, at)
        self.weights: dict[str, PackedWeight] = pack(graph, source, at, memory=stream, progress=progress)
        arena = plan_values(graph, shape.tokens, shape.rows, reuse=reuse)
        self._arena = torch.zeros(max(arena.bytes, 1), dtype=torch.uint8, device=at)
        self._values = views(graph, self._arena, arena.offsets, shape.tokens, shape.rows)
        self.kv = [_allocate_kv(group, shape, at) for group in graph.kv_groups]
        layers = {
            number: (index, _layer(pools, place))
            for index, (group, pools) in enumerate(zip(graph.kv_groups, self.kv, strict=True))
            for place, number in enumerate(group.layers)
        }
        width = _quantized_width(graph)
        quantized = None
        if width:
            data = torch.zeros(shape.tokens, width, dtype=torch.int8, device=at)
            quantized = Quantized(data, torch.zeros(shape.tokens, device=at))
        size = _scratch(graph, shape)
        self._instructions: list[Instruction] = lower(
            Lowering(
                graph=graph,
                values=self._values,
                weights=self.weights,
                layers=layers,
                quantized=quantized,
                scratch=torch.zeros(size // 4, device=at) if size else None,
            )
        )
        if stream is not None:
            self._instructions = stream.between(self._instructions)
        self._ran = [_Ran() for _ in self._instructions]
        for name, (extent, kind) in step_arrays(shape, len(graph.kv_groups)).items():
            setattr(self, name, np.zeros(extent, kind))
        self._inputs = StepInputs(shape, len(graph.kv_groups), at)
        self._sampler = DeviceSampler(at, shape.rows, graph.vocab)
        empty = np.zeros(1, np.int32)
        self.bind_sampling(empty, empty, np.zeros(1, np.float32), empty)
        self._replays: dict[int, Callable[[], None]] = {}
        self._replayed: Counter[int] = Counter()
        if recorded:
            recorder = Recorder(at)
            for size in reversed(buckets(_most_recorded(shape))):
                self._replays[size] = recorder.record(
                    partial(self._compute, self._inputs.recorded(size), counted=False)
                )

    def bind_sampling(
        self,
        history: npt.NDArray[np.int32],
        bias_ids: npt.NDArray[np.int32],
        bias_values: npt.NDArray[np.float32],
        masks: npt.NDArray[np.int32],
    ) -> None:
        """Points the sampler at this step's token histories, biases and masks."""
        self._sampling = (history, bias_ids, bias_values, masks)

    def run(
        self,
        tokens: int,
        spans: int,
        rows: int,
        table_stride: int,
        *,
        sample: bool = True,
        top1: bool = False,
    ) -> float:
        """One step over the filled arrays; gives the seconds it took. top1: every row takes its largest logit
        as it is."""
        return self.land(self.launch(tokens, spans, rows, table_stride, sample=sample, top1=top1))

    def launch(
        self,
        tokens: int,
        spans: int,
        rows: int,
        table_stride: int,
        *,
        sample: bool = True,
        top1: bool = False,
    ) -> Flight:
        """As `run`, without waiting: the arrays may be filled again at once, and steps run in the order of
        their launches. An id -1 - r stands for the token that row r of the step launched before got."""
        began = Moment(self.device.torch)
        bucket = self._bucket(tokens, spans, rows)
        step, sampling = self._inputs.fill(self, tokens, spans, rows, table_stride, bucket)
        if (self.ids[:tokens] < 0).any():
            name_tokens(step.ids[:tokens], self._sampler.tokens)
        if bucket is None:
            self._compute(step)
        else:
            self._replays[bucket]()
            self._replayed[bucket] += 1
        sampled = self._sample(rows, top1, sampling) if sample and rows else ()
        return Flight(rows, Arrival(sampled, self.device.torch, began))

    def land(self, flight: Flight) -> float:
        """Waits for a step that was launched and fills the arrays of its results; gives the seconds it took
        on the device."""
        results, seconds = flight.arrival.wait()
        for name, found in zip(_RESULTS, results, strict=False):
            getattr(self, name)[: flight.rows] = found
        return seconds

    def warm_up(self) -> None:
        """Runs steps of every kind over what is in the pages, which nobody has written yet: kernels are
        compiled before the first request, not by it."""
        most = min(self.shape.tokens, self.shape.table * self.shape.page_size)
        # Kernels are compiled apart for 1 to 4 rows, and for tiles and splits that go by powers of two.
        counts = {min(3, most), most, *(1 << n for n in range(most.bit_length()))}
        for tokens in sorted(counts):
            self.spans[0] = (0, tokens, 0, 0, -1)
            self.rows[:tokens] = tokens - 1
            rows = min(tokens, self.shape.rows)
            self.run(tokens, 1, rows, -(-tokens // self.shape.page_size), top1=True)
        self.spans[0] = (0, 1, 0, 0, -1)
        self.rows[0], self.ids[0] = 0, -1  # the token of the step before
        for asked in _ASKED:
            self.sample_rows[0] = np.zeros((), SAMPLE_ROW)
            for name, value in asked.items():
                self.sample_rows[name][0] = value
            self.run(1, 1, 1, 1)
        self.ids[0] = 0
        self._ran = [_Ran() for _ in self._instructions]
        self._replayed.clear()

    def value(self, name: str, rows: int) -> npt.NDArray[np.float32]:
        """An output ("logits", ...) after a step, [rows, width], on the host."""
        value = self._values[self.graph.outputs[name]]
        assert isinstance(value, torch.Tensor)
        found: npt.NDArray[np.float32] = value[:rows].float().cpu().numpy()
        return found

    def copy_tokens(
        self, group: int, source: int, source_slot: int, target: int, target_slot: int, tokens: int
    ) -> None:
        """Copies tokens of page `source` from a slot on to page `target` from a slot on, in every layer of a
        KV group; within a page to lower slots only."""
        copy_tokens(self.kv[group], [Move(source, source_slot, target, target_slot, tokens)])

    def receipt(self) -> list[ReceiptLine]:
        """What ran since the start, node by node. Seconds are those of the launches, kernels run on: of steps
        that were replayed there are none."""
        whole = sum(ran.seconds for ran in self._ran) or 1.0
        replays = sum(self._replayed.values())
        replayed = sum(size * count for size, count in self._replayed.items())
        lines = []
        for done, ran in zip(self._instructions, self._ran, strict=True):
            size = sum(packed_bytes(self.graph.weights[name]) for name in done.weights)
            kernel = " + ".join(ran.kernels) or done.op
            lines.append(
                ReceiptLine(
                    node=done.node,
                    kernel=kernel,
                    isa=self.isa,
                    calls=ran.calls + replays,
                    rows=ran.rows + replayed,
                    weight_bytes=size,
                    seconds=ran.seconds,
                    share=ran.seconds / whole,
                    gb_s=None,
                )
            )
        return lines

    def _bucket(self, tokens: int, spans: int, rows: int) -> int | None:
        """The recorded step that this one fits in, if it decodes a token of every sequence."""
        if not tokens == spans == rows:
            return None
        return min((size for size in self._replays if size >= spans), default=None)

    def _compute(self, step: Step, *, counted: bool = True) -> None:
        """Every node's kernels, in order. counted: for the receipt, which counts replays on its own."""
        tokens, rows = step.count(False), step.count(True)
        for done, ran in zip(self._instructions, self._ran, strict=True):
            count = rows if done.sampled else tokens
            if count == 0:
                continue
            start = time.perf_counter()
            ran.kernels[done.call(step)] = None
            if counted:
                ran.seconds += time.perf_counter() - start
                ran.calls += 1
                ran.rows += count

    def _sample(self, rows: int, top1: bool, words: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """In the order of _RESULTS, as many as there are."""
        value = self._values[self.graph.outputs["logits"]]
        assert isinstance(value, torch.Tensor)
        logits = value[:rows]
        if top1:
            return self._sampler.greedy(logits)
        found = self._sampler.sample(logits, self.sample_rows[:rows], *self._sampling, words[:rows])
        return tuple(getattr(found, name) for name in _RESULTS)


def _most_recorded(shape: StepShape) -> int:
    """Sequences of the largest step that decodes a token of each."""
    return min(shape.tokens, shape.rows, shape.spans)


def _weight_bytes(graph: Graph) -> int:
    return sum(
        packed_bytes(graph.weights[name]) for name in {n for node in graph.nodes for n in node.weights}
    )


def _allocate_kv(group: KVGroup, shape: StepShape, at: torch.device) -> list[torch.Tensor]:
    """Keys and values of a group's layers, [layers, pages, page_size, kv_heads, head_dim] each, and behind
    them the scales of int8 and fp8."""
    kind = _KV[shape.kv_dtype]
    size = (len(group.layers), shape.pages, shape.page_size, group.kv_heads, group.head_dim)
    pools = [torch.zeros(size, dtype=kind, device=at) for _ in range(2)]
    if shape.kv_dtype in _SCALED_KV:
        pools += [torch.zeros(size[:4], device=at) for _ in range(2)]
    return pools


def _layer(pools: list[torch.Tensor], place: int) -> KvLayer:
    keys, values, *scales = (pool[place] for pool in pools)
    key_scales, value_scales = scales or (None, None)
    return KvLayer(keys=keys, values=values, key_scales=key_scales, value_scales=value_scales)


def page_bytes(graph: Graph, shape: StepShape) -> list[int]:
    """Of a page of each KV group, in all its layers."""
    kind = _KV[shape.kv_dtype]
    scale = 4 if shape.kv_dtype in _SCALED_KV else 0
    return [
        2 * len(g.layers) * shape.page_size * g.kv_heads * (g.head_dim * kind.itemsize + scale)
        for g in graph.kv_groups
    ]


def _quantized_width(graph: Graph) -> int:
    """Columns of the widest rows that a layer of int8 weights quantizes for itself; 0 where none does."""
    widths = [0]
    for node in graph.nodes:
        if node.op in LINEAR_OPS and graph.values[node.inputs[0]].dtype != "prepared":
            weight = graph.weights[matrix_weights(node)[0]]
            if weight.stored == "int8":
                widths.append(weight.shape[-1])
    for node in graph.nodes:
        if node.op == "layer_norm_quantize" and (node.attrs["format"], node.attrs["group"]) == ("int8", 0):
            width = graph.values[node.outputs[0]].shape[1]
            assert isinstance(width, int)
            widths.append(width)
    return max(widths)


def _quantized_bytes(graph: Graph, shape: StepShape) -> int:
    width = _quantized_width(graph)
    return shape.tokens * (width + 4) if width else 0


def _scratch(graph: Graph, shape: StepShape) -> int:
    """Workspace of attention: layers take turns. Raises as `require_heads`."""
    sizes = [0]
    for node in graph.nodes:
        if node.op == "attention":
            heads, (_, group) = node.attrs["heads"], graph.group_of(node.attrs["layer"])
            require_heads(
                Heads(
                    heads=heads,
                    kv_heads=group.kv_heads,
                    head_dim=group.head_dim,
                    scale=node.attrs["scale"],
                    softcap=node.attrs["softcap"],
                    window=node.attrs["window"],
                ),
                _KV[shape.kv_dtype],
            )
            sizes.append(
                scratch_bytes(
                    heads,
                    group.head_dim,
                    min(shape.tokens, shape.spans),
                    shape.table * shape.page_size,
                )
            )
    return max(sizes)
