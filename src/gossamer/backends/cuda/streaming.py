"""Weights that do not fit on the device: they lie in pinned host memory, and every step brings them, block by
block, while the blocks before compute.

A streamed block's matrices lie in one piece of host memory and come by one copy into one of two buffers, the
blocks in turns. Addresses never change, so calls and recorded steps are made once. What is no block's
alone stays on the device: embeddings, of which a step reads a few rows, and the head, which has no block
beside it to hide its copy behind. So do vectors, which weigh nothing.

A step ends with nothing under way: the first two blocks are fetched when it begins, not when the last step
ended. So each recorded step is whole by itself, and results do not wait for copies that the next step wants.
The price is that the link rests while the last block, the head and the sampler compute; streamed blocks
therefore stand as late in the model as an even spread allows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal, Protocol

import torch

from gossamer.backends.base import MemoryReport
from gossamer.backends.cuda.lower import Instruction, Step
from gossamer.backends.cuda.packing import Memory, packed_bytes, run_tensors, runs
from gossamer.backends.cuda.transfer import host_memory
from gossamer.config import Offloading
from gossamer.errors import MemoryBudgetError
from gossamer.graph.ir import Graph

__all__ = ["Copies", "StreamPlan", "StreamedBlock", "WeightStream", "place_weights", "plan_streams"]

_ALIGN = 256  # bytes, of a tensor in its buffer: as allocations of the device are
_BUFFERS = 2
_MIB = 1 << 20
Act = Literal["run", "fetch", "wait"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedBlock:
    """A block whose matrices come anew in every step. first, last: its nodes [first, last). names: of its
    streamed weights. places: (a run's first weight, tensor) -> byte in the buffer. bytes: of the buffer that
    it takes."""

    scope: str
    first: int
    last: int
    names: tuple[str, ...]
    places: Mapping[tuple[str, str], int]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """blocks: that are streamed, in order; resident: bytes of all other weights."""

    blocks: tuple[StreamedBlock, ...]
    resident: int

    @property
    def buffers(self) -> int:
        """How many blocks are on the device at once."""
        return min(_BUFFERS, len(self.blocks))

    @property
    def buffer_bytes(self) -> int:
        """Of one buffer: any block fits."""
        return max((block.bytes for block in self.blocks), default=0)

    @property
    def device_bytes(self) -> int:
        """All device memory that weights take."""
        return self.resident + self.buffers * self.buffer_bytes

    @property
    def host_bytes(self) -> int:
        """Pinned host memory, and what every step copies."""
        return sum(block.bytes for block in self.blocks)

    def order(self, nodes: int) -> Iterator[tuple[Act, int]]:
        """What a step of so many nodes does, in order: runs a node, starts to fetch a block, waits for one. A
        block is waited for before its first node, and behind its last one its buffer takes the next but
        one."""
        begins = {block.first: index for index, block in enumerate(self.blocks)}
        ends = {block.last - 1: index + self.buffers for index, block in enumerate(self.blocks)}
        yield from (("fetch", index) for index in range(self.buffers))
        for node in range(nodes):
            if node in begins:
                yield "wait", begins[node]
            yield "run", node
            if ends.get(node, len(self.blocks)) < len(self.blocks):
                yield "fetch", ends[node]


def plan_streams(graph: Graph, budget: int) -> StreamPlan:
    """The plan that streams the least and whose weights take at most `budget` bytes of the device; or, where
    there is none, the one that takes least. Raises as `require_format`."""
    plans = _plans(graph)
    fitting = [plan for plan in plans if plan.device_bytes <= budget]
    if fitting:
        return min(fitting, key=lambda plan: plan.host_bytes)
    return min(plans, key=lambda plan: plan.device_bytes)


def place_weights(
    graph: Graph, memory: MemoryReport, offloading: Offloading, budget: int, host: int
) -> tuple[StreamPlan | None, MemoryReport]:
    """Which blocks of a program are streamed (None: all weights fit), and its bytes then. memory: with all
    weights on the device; budget, host: bytes of the device and of host memory that it may take. Raises
    MemoryBudgetError, naming the least that would do."""
    beside = memory.total - memory.weights
    asked = offloading.device_bytes
    most = budget - beside if asked is None else min(budget - beside, asked)
    plan = plan_streams(graph, most)
    if plan.device_bytes > most:
        least = plan.device_bytes
        needed = (
            f"weights that are streamed from host memory take {_mib(least)} of the device at the least: what "
            f"every step reads {_mib(plan.resident)}, {plan.buffers} buffers of {_mib(plan.buffer_bytes)}"
        )
        if beside + least <= budget:
            raise MemoryBudgetError(
                f"{needed}; {_mib(asked or 0)} are given, and --offload {least} is the least that would do"
            )
        raise MemoryBudgetError(
            f"{needed}; with KV ({_mib(memory.kv)}) and all else {_mib(beside + least)} are needed, and "
            f"{_mib(budget)} are there; less --kv-bytes, --max-num-batched-tokens or bits of weights would do"
        )
    if plan.host_bytes > host:
        raise MemoryBudgetError(
            f"{_mib(plan.host_bytes)} of weights are to lie in host memory, and {_mib(host)} of it are "
            "available; a weight format of fewer bits or more device memory (--memory-budget, --offload) "
            "takes less of it"
        )
    whole = replace(memory, weights=plan.device_bytes, host=plan.host_bytes)
    return plan if plan.blocks else None, whole


def _mib(size: int) -> str:
    return f"{size / _MIB:.1f} MiB"


def _plans(graph: Graph) -> list[StreamPlan]:
    """One for every number of streamed blocks."""
    every = _blocks(graph)
    read = {name for node in graph.nodes for name in node.weights}
    whole = sum(packed_bytes(graph.weights[name]) for name in read)
    sizes = [sum(packed_bytes(graph.weights[name]) for name in block.names) for block in every]
    plans = []
    for count in range(len(every) + 1):
        chosen = _spread(len(every), count)
        resident = whole - sum(sizes[index] for index in chosen)
        plans.append(StreamPlan(blocks=tuple(every[index] for index in chosen), resident=resident))
    return plans


def _spread(blocks: int, count: int) -> list[int]:
    """So many of the blocks, evenly, the last among them."""
    return [(place + 1) * blocks // count - 1 for place in range(count)]


def _blocks(graph: Graph) -> list[StreamedBlock]:
    """The blocks that have something to stream: runs of matrices that they alone read."""
    block_of: dict[int, int] = {}
    found: list[tuple[str, int, int]] = []
    at = 0
    for block in graph.blocks(depth=2):
        while graph.nodes[at] is not block.nodes[0]:
            at += 1
        first, at = at, at + len(block.nodes)
        block_of |= dict.fromkeys(range(first, at), len(found))
        found.append((block.scope, first, at))
    readers: defaultdict[str, set[int | None]] = defaultdict(set)
    for index, node in enumerate(graph.nodes):
        for name in node.weights:
            readers[name].add(block_of.get(index))
    own: defaultdict[int | None, list[tuple[str, ...]]] = defaultdict(list)
    for run in runs(graph):
        of = set().union(*(readers[name] for name in run))
        if len(of) == 1 and all(len(graph.weights[name].shape) > 1 for name in run):
            own[of.pop()].append(run)
    return [_block(graph, *each, own[index]) for index, each in enumerate(found) if own[index]]


def _block(graph: Graph, scope: str, first: int, last: int, own: Sequence[tuple[str, ...]]) -> StreamedBlock:
    places, at = {}, 0
    for run in own:
        for tensor, (shape, dtype) in run_tensors([graph.weights[name] for name in run]).items():
            places[run[0], tensor] = at
            at += -(-prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN
    names = tuple(name for run in own for name in run)
    return StreamedBlock(scope=scope, first=first, last=last, names=names, places=places, bytes=at)


class Copies(Protocol):
    """Copies that run beside what the device computes."""

    def start(self, buffer: int, copy: Callable[[], object]) -> None:
        """Runs a copy into a buffer, after everything that the device was given so far and after the copies
        that were started before."""

    def wait(self, buffer: int) -> None:
        """What the device is given from now on waits for the copy that was last started into a buffer."""


class _AtOnce:
    """Copies of the interpreter, done when they start."""

    def start(self, buffer: int, copy: Callable[[], object]) -> None:
        copy()

    def wait(self, buffer: int) -> None:
        """There it is."""


class _Beside:
    """Copies on a stream of their own. It forks from the current stream at `start` and joins it at `wait`, so
    that a step in which every copy is waited for can be recorded. cuda: torch.cuda, or what stands in."""

    def __init__(self, device: torch.device, buffers: int, cuda: Any = torch.cuda) -> None:
        self._cuda, self._device = cuda, device
        self._stream = cuda.Stream(device)
        self._free = [cuda.Event() for _ in range(buffers)]
        self._there = [cuda.Event() for _ in range(buffers)]

    def start(self, buffer: int, copy: Callable[[], object]) -> None:
        self._free[buffer].record(self._cuda.current_stream(self._device))
        self._stream.wait_event(self._free[buffer])
        with self._cuda.stream(self._stream):
            copy()
        self._there[buffer].record(self._stream)

    def wait(self, buffer: int) -> None:
        self._cuda.current_stream(self._device).wait_event(self._there[buffer])


class WeightStream(Memory):
    """The streamed weights of a program: packing fills them through it, steps fetch them with it."""

    def __init__(self, plan: StreamPlan, device: torch.device, copies: Copies | None = None) -> None:
        """Takes the plan's host memory and buffers. Raises MemoryBudgetError where the host's cannot be
        pinned."""
        super().__init__(device)
        self.plan = plan
        self._buffers = [
            torch.empty(plan.buffer_bytes, dtype=torch.uint8, device=device) for _ in range(plan.buffers)
        ]
        whole = host_memory(plan.host_bytes, device, self, "weights", "more device memory (--offload)")
        self._host: list[torch.Tensor] = [*whole.split_with_sizes([b.bytes for b in plan.blocks])]
        self._block_of = {name: index for index, block in enumerate(plan.blocks) for name in block.names}
        if copies is None:
            copies = _Beside(device, plan.buffers) if device.type == "cuda" else _AtOnce()
        self._copies = copies

    def take(
        self, run: tuple[str, ...], tensor: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """A view of the block's buffer, or memory of its own for what is not streamed."""
        index = self._block_of.get(run[0])
        if index is None:
            return super().take(run, tensor, shape, dtype)
        at = self.plan.blocks[index].places[run[0], tensor]
        buffer = self._buffers[index % self.plan.buffers]
        return buffer[at : at + prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def filled(self, run: tuple[str, ...]) -> None:
        """Puts a block into host memory when its last run is there, and its buffer is free for another."""
        index = self._block_of.get(run[0])
        if index is not None and self.plan.blocks[index].names[-1] == run[-1]:
            host = self._host[index]
            host.copy_(self._buffers[index % self.plan.buffers][: len(host)])

    def fetch(self, index: int) -> None:
        """Starts to bring a block, once the device is done with everything that it was given so far."""
        self._copies.start(index % self.plan.buffers, partial(self._copy, index))

    def wait(self, index: int) -> None:
        """What the device is given from now on finds the block's weights in place."""
        self._copies.wait(index % self.plan.buffers)

    def between(self, instructions: Sequence[Instruction]) -> list[Instruction]:
        """A program's instructions, one for each node, and between them those that bring weights."""
        make: dict[Act, Callable[[int], Instruction]] = {
            "run": lambda index: instructions[index],
            "fetch": self._fetching,
            "wait": self._waiting,
        }
        return [make[act](index) for act, index in self.plan.order(len(instructions))]

    def _copy(self, index: int) -> None:
        host = self._host[index]
        self._buffers[index % self.plan.buffers][: len(host)].copy_(host, non_blocking=True)

    def _fetching(self, index: int) -> Instruction:
        def call(step: Step) -> str:
            self.fetch(index)
            return "stream_weights"

        block = self.plan.blocks[index]
        return Instruction(f"{block.scope}.weights", "stream_weights", block.names, False, call)

    def _waiting(self, index: int) -> Instruction:
        def call(step: Step) -> str:
            self.wait(index)
            return "wait_for_weights"

        return Instruction(f"{self.plan.blocks[index].scope}.weights", "wait_for_weights", (), False, call)
