"""A model of random weights behind the engine, as a row runs it: through requests, as everyone does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.cuda.measure import Bench, Line
from benchmarks.cuda.shapes import write_shape
from gossamer.backends.cuda.packing import packed_bytes
from gossamer.engine.request import SamplingParams
from gossamer.graph.ir import Graph
from gossamer.graph.ops.base import node_cost
from gossamer.graph.ops.fused import LINEAR_OPS
from gossamer.llm import engine_config
from gossamer.runtime.start import start
from gossamer.text_engine import TextEngine

__all__ = ["Model", "decode_bytes", "kv_token_bytes", "needed_flops"]


class Model:
    """A started shape and its engine; free device memory is noted before.

    options: of `engine_config`.
    """

    def __init__(self, bench: Bench, shape: str, *, tokens: int, sequences: int = 1, **options: Any) -> None:
        """tokens: most of a step. Raises GossamerError for what does not fit or does not exist."""
        self._bench = bench
        if bench.at.type == "cuda":
            torch.cuda.empty_cache()
        self._free = self._device_bytes()
        began = time.perf_counter()
        directory = write_shape(shape, bench.directory, tiny=bench.tiny)
        config = engine_config(
            directory,
            backend="cuda",
            load_format="dummy",
            max_num_batched_tokens=tokens,
            max_num_seqs=sequences,
            prefix_cache=None,
            **options,
        )
        self.name = shape if config.quantization is None else f"{shape}, {options['quantization']}"
        self.started = start(config)
        self.load_seconds = time.perf_counter() - began
        self.engine = TextEngine(self.started)
        self.graph = self.started.graph
        self._requests = 0

    def submit(self, prompt: int, output: int) -> None:
        """Queues a request of so many random tokens, which goes past end tokens."""
        self._requests += 1
        noise = torch.Generator().manual_seed(self._requests)
        ids = torch.randint(self.graph.vocab, (prompt,), generator=noise).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        self.engine.submit(self.engine.new_id(), ids, params)

    def step(self) -> int:
        """One step of the engine; how many tokens it brought."""
        updates = self.engine.step()
        failed = [u.stop_reason for u in updates if u.finish_reason == "error"]
        if failed:
            raise RuntimeError(f"a request failed: {failed[0]}")
        return sum(len(update.tokens) for update in updates)

    def run(self) -> int:
        """To the end of all requests; how many tokens came."""
        came = 0
        while self.engine.has_work():
            came += self.step()
        return came

    def until(self, tokens: int) -> None:
        """Steps until at least so many tokens came."""
        came = 0
        while came < tokens:
            if not self.engine.has_work():
                raise RuntimeError(f"the requests ended after {came} of {tokens} tokens")
            came += self.step()

    def decoding(self, prompt: int, warm: int, steps: int, *, calls: int) -> Callable[[], object]:
        """A sequence that has `warm` tokens behind its prompt; what is given lets `steps` more of them come,
        so often."""
        self.submit(prompt, warm + (calls + 1) * steps)
        self.until(warm)
        return lambda: self.until(steps)

    def prefill_seconds(self, prompt: int) -> float:
        """From a request to its only token."""
        self.submit(prompt, 1)
        began = time.perf_counter()
        self.run()
        return time.perf_counter() - began

    def memory_line(self) -> Line:
        """Memory of the device that the process took since before the start, against the plan."""
        plan = self.started.memory
        taken = self._free - self._device_bytes()
        detail: dict[str, Any] = {
            "weights": plan.weights, "kv": plan.kv, "arena": plan.arena, "workspace": plan.workspace,
            "load_seconds": round(self.load_seconds, 2), "host_bytes": self.started.process,
        }  # fmt: skip
        if self._bench.at.type == "cuda":
            detail |= {
                "torch_allocated_most": torch.cuda.max_memory_allocated(self._bench.at),
                "torch_reserved": torch.cuda.memory_reserved(self._bench.at),
            }
        return Line(
            case=f"resident memory, {self.name}",
            value=taken / 1e9,
            limit=plan.total / 1e9,
            unit="GB",
            against="the byte plan",
            bar=1.0,
            wanted="at most",
            note="all that the device lost since before the start: kernels and library workspaces too",
            detail=detail,
        )

    def _device_bytes(self) -> int:
        if self._bench.at.type != "cuda":
            return 0
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._bench.at)
        return torch.cuda.mem_get_info(self._bench.at)[0]


def kv_token_bytes(model: Model) -> float:
    """Bytes of the keys and values of a token, all layers together."""
    memory = model.started.memory
    return memory.kv / memory.kv_tokens


def decode_bytes(graph: Graph, kv_token_bytes: float, contexts: Sequence[int]) -> float:
    """Bytes that a step must read, one token for each context: every weight once, rows of the embedding
    alone, and the keys and values."""
    tables = {node.weights[0] for node in graph.nodes if node.op == "embed"}
    read = {name for node in graph.nodes if node.op != "embed" for name in node.weights}
    weights = sum(packed_bytes(graph.weights[name]) for name in read)
    rows = sum(packed_bytes(graph.weights[name]) / graph.weights[name].shape[0] for name in tables)
    return weights + rows * len(contexts) + kv_token_bytes * sum(contexts)


def needed_flops(graph: Graph, tokens: int, rows: int) -> dict[str, float]:
    """Floating-point operations of a prompt of `tokens` tokens of which `rows` are sampled: of "linear"
    layers, and of "attention", where a causal mask leaves half."""
    amounts = {"1": 1, "T": tokens, "R": rows, "S": 1, "C": tokens, "A": tokens * (tokens + 1) / 2}
    found = {"linear": 0.0, "attention": 0.0}
    for node in graph.nodes:
        kind = "linear" if node.op in LINEAR_OPS else node.op
        if kind in found:
            cost = node_cost(graph, node).flops
            found[kind] += sum(each * amounts[dim] for dim, each in cost.items())
    return found
