"""Streamed weights: the same bits as resident ones, bytes as planned, and no copy out of turn."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.backends.cpu.plan import StepShape
from gossamer.backends.cuda.device import open_device
from gossamer.backends.cuda.lower import Instruction, Step
from gossamer.backends.cuda.packing import packed_bytes
from gossamer.backends.cuda.program import CudaProgram, plan_memory
from gossamer.backends.cuda.streaming import (
    StreamedBlock,
    StreamPlan,
    WeightStream,
    _Beside,
    place_weights,
    plan_streams,
)
from gossamer.checkpoint.weights import DummySource
from gossamer.config import EngineConfig, MixedPrecision, Offloading, Quantization
from gossamer.engine.step import Span, StepPlan
from gossamer.errors import ConfigError, ConflictError, MemoryBudgetError
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph
from gossamer.runtime import cuda as start_module
from gossamer.runtime.local import LocalExecutor
from gossamer.runtime.planning import passed, step_shape
from gossamer.runtime.sizing import plan_kv
from tests.backends.cuda.test_program import FAMILIES, SIZES, config_of, started

LAYERS = 3
SMALL = {
    **SIZES,
    "vocab_size": 17,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GPT2 = {"vocab_size": 17, "n_embd": 32, "n_head": 2, "n_positions": 64}
FORMATS: dict[str, dict[str, Any]] = {
    "f32": {"kv_dtype": "f32"},
    "bf16": {"mixed_precision": MixedPrecision()},
    "int8": {"quantization": Quantization(format="int8"), "kv_dtype": "int8"},
    "fp8": {"quantization": Quantization(format="fp8"), "kv_dtype": "fp8"},
    "int4": {"quantization": Quantization(format="int4", group=32)},
    "uint4": {"quantization": Quantization(format="uint4", group=32)},
    "nf4": {"quantization": Quantization(format="nf4", group=32)},
}


def deep(family: str, layers: int = LAYERS) -> Graph:
    """A small model of so many layers."""
    kind, fields = FAMILIES[family]
    given = (
        {**GPT2, "n_layer": layers} if family == "gpt2" else {**SMALL, **fields, "num_hidden_layers": layers}
    )
    config = getattr(transformers, kind)(**given)
    config.architectures = [kind.replace("Config", "LMHeadModel" if family == "gpt2" else "ForCausalLM")]
    return build_graph(config.to_dict(), name=family)


def planned(graph: Graph, config: EngineConfig) -> tuple[Graph, StepShape]:
    """The graph after its passes, and what its steps may hold."""
    after, _ = passed(graph, config)
    return after, step_shape(after, config, plan_kv(after, config, 1 << 24))


def made(
    graph: Graph, config: EngineConfig, device_bytes: int | None = None, *, recorded: bool = False
) -> CudaProgram:
    """A program; recording its steps takes the interpreter long."""
    after, shape = planned(graph, config)
    streams = None if device_bytes is None else plan_streams(after, device_bytes)
    return CudaProgram(after, DummySource(graph), shape, open_device(), streams=streams, recorded=recorded)


def least(graph: Graph, config: EngineConfig) -> StreamPlan:
    """The plan that takes the least device memory."""
    return plan_streams(planned(graph, config)[0], 0)


def logits(program: CudaProgram, *, decode: bool = False) -> list[npt.NDArray[np.float32]]:
    """Of two prompts, the rest of the longer one beside a decode of the other, then a step of decodes."""
    executor, groups = LocalExecutor(program, 32), len(program.graph.kv_groups)

    def span(sequence: int, tokens: list[int], start: int) -> Span:
        return Span(sequence, tokens, start, range(len(tokens)), ((sequence, sequence + 2),) * groups)

    steps = [(span(0, [3, 14, 15], 0), span(1, [9, 2], 0)), (span(0, [6, 5], 3), span(1, [8], 2))]
    steps += [(span(0, [1], 5), span(1, [4], 3))] if decode else []
    return [executor.logits(StepPlan(step)).copy() for step in steps]


@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("llama", "nf4"),
        ("qwen3", "bf16"),
        ("gpt2", "int8"),
        *(
            pytest.param(family, format, marks=pytest.mark.slow)
            for family, format in (
                ("llama", "f32"),
                ("llama", "int8"),
                ("llama", "fp8"),
                ("llama", "int4"),
                ("qwen3-moe", "uint4"),
            )
        ),
    ],
)
def test_logits_are_those_of_resident_weights(family: str, format: str) -> None:
    graph, config = deep(family), config_of(**FORMATS[format])
    plan = least(graph, config)
    program = made(graph, config, plan.device_bytes)
    for got, want in zip(logits(program), logits(made(graph, config)), strict=True):
        assert np.array_equal(got, want)
    assert program.memory.host == plan.host_bytes > 0
    lines = program.receipt()
    brought = {line.node: line for line in lines if line.kernel == "stream_weights"}
    assert list(brought) == [f"layers.{i}.weights" for i in range(LAYERS)]
    assert {line.calls for line in lines} == {2}, "all of it runs in every step"


def test_recorded_steps_and_blocks_that_stay() -> None:
    """As it starts, within a budget: what fits beside the rest stays, and no size is named."""
    graph, config = deep("llama", 4), config_of(**FORMATS["int8"])
    after, shape = planned(graph, config)
    whole = plan_memory(after, shape)
    config = replace(config, memory_budget=whole.total - 1000)
    with pytest.raises(MemoryBudgetError, match="--offload auto"):
        started(graph, config)
    program, _, _ = started(graph, replace(config, offloading=Offloading()))
    assert program.memory.total <= whole.total - 1000 and program.memory.host > 0
    want = logits(made(graph, config, recorded=True), decode=True)
    for got in (logits(program, decode=True), logits(program, decode=True)):
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    assert sum(program._replayed.values()) == 2
    brought = [line for line in program.receipt() if line.kernel == "stream_weights"]
    assert [line.node for line in brought] == [f"layers.{i}.weights" for i in (0, 1, 3)]


def test_nothing_is_streamed_where_everything_fits() -> None:
    graph, config = deep("llama"), config_of(kv_dtype="f32")
    after, shape = planned(graph, config)
    whole = plan_memory(after, shape)
    assert place_weights(after, whole, Offloading(), whole.total, 0) == (None, whole)
    assert place_weights(after, whole, Offloading(device_bytes=whole.weights), 1 << 40, 0) == (None, whole)


def test_memory_is_what_was_planned() -> None:
    graph, config = deep("llama", 5), config_of(**FORMATS["uint4"])
    after, shape = planned(graph, config)
    whole = plan_memory(after, shape)
    asked = Offloading(device_bytes=least(graph, config).device_bytes)
    plan, memory = place_weights(after, whole, asked, 1 << 40, 1 << 40)
    assert plan is not None and plan == least(graph, config)
    assert memory == replace(whole, weights=plan.device_bytes, host=plan.host_bytes)
    program = made(graph, config, asked.device_bytes)
    assert program.memory == memory == plan_memory(after, shape, streams=plan)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for w in program.weights.values()
        for t in (w.data, w.scales, w.zeros)
        if t is not None
    }
    assert sum(held.values()) == memory.weights < whole.weights
    stream = WeightStream(plan, torch.device("cpu"))
    assert sum(len(host) for host in stream._host) == memory.host
    assert [block.scope for block in plan.blocks] == [f"layers.{i}" for i in range(5)]


def test_what_cannot_be_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, config = deep("llama"), config_of(kv_dtype="f32")
    after, shape = planned(graph, config)
    whole, need = plan_memory(after, shape), least(graph, config).device_bytes
    few = Offloading(device_bytes=need - 1)
    with pytest.raises(MemoryBudgetError, match=rf"2 buffers of .* --offload {need} is the least"):
        place_weights(after, whole, few, 1 << 40, 1 << 40)
    with pytest.raises(MemoryBudgetError, match=r"to lie in host memory, and 0\.0 MiB of it are"):
        place_weights(after, whole, replace(few, device_bytes=need), 1 << 40, 1000)
    monkeypatch.setattr(start_module, "CudaProgram", None)
    with pytest.raises(
        MemoryBudgetError, match=r"with KV .* are needed, and 0\.0 MiB are there; less --kv-bytes"
    ):
        started(graph, replace(config, offloading=Offloading(), memory_budget=1000))
    with pytest.raises(ConfigError, match="at least 1"):
        Offloading(device_bytes=0)
    for backend in ("cpu", "reference"):
        with pytest.raises(ConflictError, match=r"lie there already .*-q int4.* with --backend cuda"):
            EngineConfig(model="m", backend=backend, offloading=Offloading())  # type: ignore[arg-type]


PLANNED = {
    (family, format): passed(deep(family, 6), config_of(**FORMATS[format]))[0]
    for family, format in (("llama", "int4"), ("qwen3", "bf16"), ("qwen3-moe", "int8"), ("gpt2", "f32"))
}


@pytest.mark.parametrize("graph", PLANNED.values(), ids=["-".join(key) for key in PLANNED])
def test_matrices_of_blocks_are_streamed_and_all_else_stays(graph: Graph) -> None:
    plan = plan_streams(graph, 0)
    streamed = {name for block in plan.blocks for name in block.names}
    for block in plan.blocks:
        places = list(block.places.values())
        assert places == sorted(set(places)) and all(at % 256 == 0 for at in places)
        inside = range(block.first, block.last)
        for index, node in enumerate(graph.nodes):
            assert (index in inside) == node.scope.startswith(block.scope + ".")
            for name in node.weights:
                matrix = len(graph.weights[name].shape) > 1
                assert (name in block.names) == (index in inside and matrix), name
    assert streamed.isdisjoint({"embedding", "head"})
    sizes = {name: packed_bytes(w) for name, w in graph.weights.items()}
    assert plan.resident + sum(sizes[name] for name in streamed) == plan_streams(graph, 1 << 40).resident


@settings(deadline=None)
@given(st.sampled_from(sorted(PLANNED)), st.lists(st.integers(0, 1 << 19), min_size=1, max_size=4))
def test_plans_hold_to_the_budget(key: tuple[str, str], budgets: list[int]) -> None:
    graph = PLANNED[key]
    lowest, before = plan_streams(graph, 0), 1 << 60
    for budget in sorted(budgets):
        plan = plan_streams(graph, budget)
        assert plan.resident > 0 and plan.host_bytes >= 0
        assert plan.device_bytes <= max(budget, lowest.device_bytes)
        assert plan.host_bytes <= before, "more room, and yet more is streamed"
        before = plan.host_bytes
        if plan.blocks:
            gaps = [b.first - a.first for a, b in zip(plan.blocks, plan.blocks[1:], strict=False)]
            widths = {b.last - b.first for b in plan.blocks}
            assert max(gaps, default=0) - min(gaps, default=0) <= max(widths), "spread evenly"
            assert plan.blocks[-1].scope == "layers.5"


@pytest.mark.parametrize("link", [25e9, 50e9], ids=["PCIe 4.0", "PCIe 5.0"])
def test_70b_in_24_gb_keeps_the_link_busy(link: float) -> None:
    """A step's time by the clock of two streams, over the least that its copies alone take."""
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    graph, read = build_graph(config.to_dict(), name="70b"), 1e12  # bytes a second of device memory
    asked = replace(config_of(**FORMATS["int4"]), max_model_len=4096, memory_budget=24 * 10**9)
    after, _ = passed(graph, replace(asked, quantization=Quantization(format="int4", group=128)))
    memory = plan_memory(after, step_shape(after, asked, plan_kv(after, asked, 24 * 10**9)))
    plan, memory = place_weights(after, memory, Offloading(), 24 * 10**9, 1 << 40)
    assert plan is not None and memory.total <= 24 * 10**9 < memory.total + 2 * plan.buffer_bytes
    assert 13e9 < memory.host < 17e9
    computed = copied = 0.0
    there = {}
    for act, index in plan.order(len(after.nodes)):
        if act == "fetch":
            copied = max(copied, computed) + plan.blocks[index].bytes / link
            there[index] = copied
        elif act == "wait":
            computed = max(computed, there.pop(index))
        else:
            weights = sum(packed_bytes(after.weights[name]) for name in after.nodes[index].weights)
            computed += 20e-6 + weights / read
    assert not there
    assert memory.host / link / computed > 0.95, "of the link's bound; four fifths are promised"


@pytest.mark.gpu
def test_large_blocks_over_many_steps_on_a_gpu() -> None:
    """Copies that take longer than what they must not overtake."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10, "head_dim": 64}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 4096}
    config = transformers.LlamaConfig(**sizes, **heads, architectures=["LlamaForCausalLM"])
    graph, options = build_graph(config.to_dict(), name="large"), config_of(**FORMATS["bf16"])
    resident = logits(made(graph, options, recorded=True), decode=True)
    program = made(graph, options, least(graph, options).device_bytes, recorded=True)
    for _ in range(20):
        for got, want in zip(logits(program, decode=True), resident, strict=True):
            assert np.array_equal(got, want)


# Streams and events as CUDA has them, run later and in any order that they allow.


class Cuda:
    """Stands in for torch.cuda. rank: which of the streams that can go on does."""

    def __init__(self, rank: Callable[[Lane], float]) -> None:
        self._rank = rank
        self.main, self.side = Lane(self), Lane(self)
        self.current, self.time = self.main, 0

    def Stream(self, device: torch.device) -> Lane:
        return self.side

    def Event(self) -> Event:
        return Event()

    def current_stream(self, device: torch.device) -> Lane:
        return self.current

    @contextmanager
    def stream(self, lane: Lane) -> Iterator[None]:
        self.current, before = lane, self.current
        yield
        self.current = before

    def run(self) -> None:
        """All that was given to the streams."""
        while lanes := [lane for lane in (self.main, self.side) if lane.queue]:
            ready = [lane for lane in lanes if lane.queue[0][0]()]
            assert ready, "every stream waits"
            min(ready, key=self._rank).queue.popleft()[1]()


class Lane:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.forked = cuda, 0
        self.queue: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()

    def do(self, call: Callable[[], None]) -> None:
        self.queue.append((lambda: True, call))

    def wait_event(self, event: Event) -> None:
        version = event.recorded
        self.forked = max(self.forked, event.at)
        self.queue.append((lambda: event.reached >= version, lambda: None))


class Event:
    def __init__(self) -> None:
        self.recorded = self.reached = self.at = 0

    def record(self, lane: Lane) -> None:
        self.recorded += 1
        version = self.recorded
        if lane is lane.cuda.main:
            lane.cuda.time += 1
            self.at = lane.cuda.time
        lane.do(lambda: setattr(self, "reached", version))


class Simulated(WeightStream):
    """A stream over such lanes; a copy takes two moments."""

    cuda: Cuda

    def _copy(self, index: int) -> None:
        lane, host = self.cuda.current, self._host[index]
        assert lane is self.cuda.side
        half = len(host) // 2
        buffer = self._buffers[index % self.plan.buffers]
        lane.do(lambda: buffer[:half].copy_(host[:half]))  # type: ignore[arg-type, return-value]
        lane.do(lambda: buffer[half : len(host)].copy_(host[half:]))  # type: ignore[arg-type, return-value]


def simulate(
    blocks: int, streamed: list[int], steps: int, rank: Callable[[Cuda, Lane], float], beside: type[_Beside]
) -> None:
    """Runs steps of so many blocks of two nodes each. Every node reads its weights when it begins and when
    it ends."""
    plan = StreamPlan(
        blocks=tuple(
            StreamedBlock(
                scope=f"layers.{at}",
                first=2 * at,
                last=2 * at + 2,
                names=(),
                places={},
                bytes=256 * (1 + at % 3),
            )
            for at in streamed
        ),
        resident=0,
    )
    device = torch.device("cpu")
    cuda = Cuda(lambda lane: rank(cuda, lane))
    stream = Simulated(plan, device, beside(device, plan.buffers, cuda))
    stream.cuda = cuda
    for index, host in enumerate(stream._host):
        host.fill_(index + 1)
    numbers = {at: index for index, at in enumerate(streamed)}

    def check(block: int) -> None:
        index = numbers.get(block)
        if index is not None:
            read = stream._buffers[index % plan.buffers][: plan.blocks[index].bytes]
            assert (read == index + 1).all(), f"block {block} reads what is not there"

    def node(block: int) -> Instruction:
        def call(step: Step) -> str:
            cuda.main.do(lambda: check(block))
            cuda.main.do(lambda: check(block))
            return ""

        return Instruction(f"layers.{block}", "node", (), False, call)

    program = stream.between([node(block) for block in range(blocks) for _ in range(2)])
    for _ in range(steps):
        began = cuda.time
        for instruction in program:
            assert cuda.current is cuda.main
            instruction.call(None)  # type: ignore[arg-type]
            if instruction.op == "stream_weights":
                assert cuda.side.forked > began, "a copy that does not hang on this step: no recorded step"
        cuda.main.do(partial(joined, cuda, list(cuda.side.queue)))
    cuda.run()


def joined(cuda: Cuda, copies: list[Any]) -> None:
    """Of a step that ends nothing is under way."""
    assert not any(entry is copy for entry in cuda.side.queue for copy in copies), "a step left copies behind"


RANKS: dict[str, Callable[[Cuda, Lane], float]] = {
    "copies first": lambda cuda, lane: lane is cuda.main,
    "copies last": lambda cuda, lane: lane is cuda.side,
    "any": lambda cuda, lane: random.random(),
}


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 9), st.integers(1, 3), st.sampled_from(sorted(RANKS)), st.integers(0, 99))
def test_no_block_runs_before_its_copy_and_no_copy_before_its_turn(
    data: st.DataObject, blocks: int, steps: int, rank: str, seed: int
) -> None:
    streamed = sorted(data.draw(st.sets(st.integers(0, blocks - 1), min_size=1)))
    random.seed(seed)
    simulate(blocks, streamed, steps, RANKS[rank], _Beside)


class _Hasty(_Beside):
    """Copies at once, over what is still read."""

    def start(self, buffer: int, copy: Callable[[], object]) -> None:
        with self._cuda.stream(self._stream):
            copy()
        self._there[buffer].record(self._stream)


class _Blind(_Beside):
    """Waits for nothing."""

    def wait(self, buffer: int) -> None:
        pass


@pytest.mark.parametrize(
    ("wrong", "rank", "words"),
    [(_Hasty, "copies first", "hang on this step"), (_Blind, "copies last", "reads what is not there")],
)
def test_the_simulation_notices(wrong: type[_Beside], rank: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        simulate(6, [0, 1, 2, 3, 4, 5], 2, RANKS[rank], wrong)
