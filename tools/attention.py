"""Times attention alone against this machine's limits: prefill as a fraction of the bf16 peak, decode as a
fraction of the read bandwidth, both probed in the same run.

    python tools/attention.py --heads 32 --kv-heads 8 --head-dim 64 --threads 2
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np

from gossamer.backends.cpu.program import CpuProgram, StepShape, kv_page_bytes
from gossamer.graph.builder import Builder
from gossamer.graph.ir import Graph, KVGroup
from gossamer.graph.weights import Tensor
from gossamer.planner.hardware import Prober, median_rates

_PAGE = 16
_COLD = 256 << 20  # bytes that a round of decodes reads, so that no cache holds them


class _Random:
    """Rows of every input: a WeightSource."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        self._arrays = {
            name: np.random.default_rng(i).standard_normal(shape, np.float32)
            for i, (name, shape) in enumerate(shapes.items())
        }

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._arrays[name][start:stop]

    def release(self, name: str) -> None:
        """Nothing to let go."""

    def content_key(self) -> str:
        return "random"


def _graph(args: argparse.Namespace, tokens: int, layers: int) -> Graph:
    """Attention of `layers` layers over one set of queries, keys and values."""
    b = Builder("attention", "bench")
    q, k, v = (
        b.op("embed", "ids", weights=(b.weight(name, Tensor(name, shape)),), scale=1.0, out=f"{name}_in")
        for name, shape in _shapes(args, tokens).items()
    )
    for layer in range(layers):
        kv = b.op("kv_write", k, v, layer=layer, head_dim=args.head_dim, out=f"kv{layer}")
        out = b.op(
            "attention", q, kv, layer=layer, heads=args.heads, head_dim=args.head_dim,
            scale=args.head_dim**-0.5, window=None, softcap=None, out=f"out{layer}",
        )  # fmt: skip
    group = KVGroup("full", tuple(range(layers)), args.kv_heads, args.head_dim, None)
    return b.finish(
        outputs={"logits": out}, vocab=16, hidden=1, layers=layers, max_positions=1 << 20, kv_groups=(group,)
    )


def _shapes(args: argparse.Namespace, tokens: int) -> dict[str, tuple[int, int]]:
    heads = {"q": args.heads, "k": args.kv_heads, "v": args.kv_heads}
    return {name: (tokens, count * args.head_dim) for name, count in heads.items()}


def _program(args: argparse.Namespace, kv_dtype: str, tokens: int, context: int, layers: int) -> CpuProgram:
    pages = -(-context // _PAGE)
    shape = StepShape(
        tokens=tokens, rows=1, spans=1, page_size=_PAGE, pages=pages, table=pages, kv_dtype=kv_dtype
    )
    graph, source = _graph(args, tokens, layers), _Random(_shapes(args, tokens))
    program = CpuProgram(graph, source, shape, isa=args.isa, threads=args.threads)
    program.tables[:pages] = np.random.default_rng(0).permutation(pages)
    return program


def _run(program: CpuProgram, tokens: int, start: int) -> dict[str, float]:
    """Seconds of one step by op."""
    before = program.receipt()
    program.ids[:tokens] = np.arange(tokens)
    program.positions[:tokens] = np.arange(start, start + tokens)
    program.spans[0] = (0, tokens, start, 0, -1)
    program.run(tokens, 1, 0, program.shape.pages, sample=False)
    seconds: dict[str, float] = {}
    for old, new in zip(before, program.receipt(), strict=True):
        op = new.kernel.split(".")[1].removesuffix("_f32")
        seconds[op] = seconds.get(op, 0.0) + new.seconds - old.seconds
    return seconds


def prefill(args: argparse.Namespace, kv_dtype: str, tokens: int) -> tuple[float, float]:
    """Median seconds of attention and of writing keys and values, one layer, `tokens` from position 0."""
    program = _program(args, kv_dtype, tokens, tokens, 1)
    times = [_run(program, tokens, 0) for _ in range(args.runs)]
    return tuple(statistics.median(t[op] for t in times) for op in ("attention", "kv_write"))  # type: ignore[return-value]


def decode(args: argparse.Namespace, kv_dtype: str, context: int) -> tuple[float, int]:
    """Median seconds of one token's attention in one layer, its caches cold, and the bytes it reads."""
    size = kv_page_bytes(_graph(args, 1, 1), _PAGE, kv_dtype) * -(-context // _PAGE)
    layers = max(2, -(-_COLD // size))
    first = min(context, 64)
    program = _program(args, kv_dtype, first, context, layers)
    _run(program, first, 0)
    for pool in program.kv:  # what the first pages hold, everywhere
        filled = program.tables[: first // _PAGE]
        for page in program.tables[len(filled) : program.shape.pages]:
            pool[:, page] = pool[:, filled[page % len(filled)]]
    times = [_run(program, 1, context - 1)["attention"] / layers for _ in range(args.runs)]
    return statistics.median(times), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (("heads", 32), ("kv-heads", 8), ("head-dim", 64), ("threads", 2), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--isa", default=None)
    parser.add_argument("--kv", default="bf16", help="types of keys and values, with commas")
    parser.add_argument("--prefill", default="512,4096")
    parser.add_argument("--decode", default="2048,8192,32768")
    args = parser.parse_args()
    prober = Prober(args.isa, args.threads)
    args.isa = prober.isa
    probes, lines = [prober.measure()], []
    for kv_dtype in args.kv.split(","):
        for tokens in map(int, filter(None, args.prefill.split(","))):
            seconds, writing = prefill(args, kv_dtype, tokens)
            macs = tokens * (tokens + 1) / 2 * args.heads * args.head_dim * 2
            lines.append(
                (f"{kv_dtype} prefill {tokens}", seconds, writing, macs / seconds / 1e9, "bf16_gmacs")
            )
            probes.append(prober.measure())
        for context in map(int, filter(None, args.decode.split(","))):
            seconds, size = decode(args, kv_dtype, context)
            lines.append((f"{kv_dtype} decode {context}", seconds, 0.0, size / seconds / 1e9, "read_gb_s"))
            probes.append(prober.measure())
    rates = median_rates(probes)
    print(rates)
    for name, seconds, writing, rate, limit in lines:
        fraction = rate / getattr(rates, limit)
        note = f", writing KV {writing * 1e3:.2f} ms" if writing else ""
        print(f"{name:24} {seconds * 1e3:9.3f} ms {rate:8.1f} {limit} {fraction:5.0%}{note}")


if __name__ == "__main__":
    main()
