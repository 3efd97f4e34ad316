"""What `benchmarks.kernels` measures: one-op graphs at the sizes of Llama-3.2-1B (experts: 4 of 32).

A bench is one compiled program; its cases are steps of different sizes over it. What an op must read and
multiply comes from its own cost rule, and formats from the product's configs, so that a new format or a
changed op needs no line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

from gossamer.backends.cpu.formats import FORMATS, kv_page_bytes
from gossamer.backends.cpu.program import SAMPLE_ROW
from gossamer.checkpoint.sparsity import with_nonzeros
from gossamer.checkpoint.weights import DummySource
from gossamer.config import EngineConfig, MixedPrecision, Quantization, SparseWeights
from gossamer.config.engine import KVType
from gossamer.config.mixed_precision import HalfType
from gossamer.config.quantization import GROUPS, WeightFormat
from gossamer.graph.builder import Builder
from gossamer.graph.families import build_graph
from gossamer.graph.ir import SPARSE_FORMATS, Graph, KVGroup
from gossamer.graph.ops.base import node_cost, weight_bytes
from gossamer.graph.weights import Constant, Stack, Tensor
from gossamer.passes.mixed_precision import mixed_precision
from gossamer.passes.pipeline import run_passes
from gossamer.passes.quantization import quantization
from gossamer.passes.sparse_weights import sparse_weights
from gossamer.planner.costs import step_costs

__all__ = ["Bench", "Case", "Store", "Work", "benches", "limit_of", "sparse_stores", "stores"]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 2048, 32, 8, 64, 8192, 128256
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
_LAYERS = {
    "q": (HIDDEN, HIDDEN),
    "kv": (KV_HEADS * HEAD_DIM, HIDDEN),
    "up": (MLP, HIDDEN),
    "down": (HIDDEN, MLP),
}
_SAMPLED = 32  # rows of the head: it sees sampled rows alone
_EXPERTS, _CHOSEN, _EXPERT_MLP = 32, 4, 1024
_PAGE = _PANEL = 16
_SPARSITIES = ("0.5", "2:4")
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": max(ROWS),  # the head has cases of its own
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class Store:
    """One way to keep weights: its spelling, and the configuration that asks for it. sparsity: of weights
    that are stored without their zeros."""

    name: str
    config: EngineConfig
    sparsity: str | None = None

    def apply(self, graph: Graph) -> Graph:
        """The graph with its matrices in this format, and nothing else changed."""
        if self.config.mixed_precision is not None:
            graph = mixed_precision(graph, self.config)
        elif self.config.quantization is not None:
            graph = quantization(graph, self.config)
        if self.sparsity is None:
            return graph
        graph = with_nonzeros(graph, DummySource(graph, self.sparsity), count=True)
        return sparse_weights(graph, self.config)


@dataclass(frozen=True, slots=True)
class Work:
    """What one run needs at least. read: bytes that must come from memory (weights, keys and values);
    moved: those and the activations; macs: multiply-accumulates."""

    read: float
    moved: float
    macs: float


@dataclass(frozen=True, slots=True)
class Case:
    """One step over a bench's program. op: the receipt's name of what is measured ("sample" is the sampler,
    which has no line there, "layer" everything); spans: (tokens, first slot) of each sequence."""

    name: str
    op: str
    spans: tuple[tuple[int, int], ...]
    work: Work
    sampling: Mapping[str, float] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return sum(count for count, _ in self.spans)


@dataclass(frozen=True, slots=True)
class Bench:
    """A graph and its steps. format: that of weights or of KV, which says what its peak is; table: pages of
    one sequence; sparsity: of its weights, which are dummies; flash: attention keeps its scores in tiles."""

    format: str
    graph: Graph
    cases: tuple[Case, ...]
    kv_dtype: str = "bf16"
    table: int = 1
    sparsity: str | None = None
    flash: bool = True


def stores() -> list[Store]:
    """Every format and group that a model can be stored in, under the command line's spelling; a spelling
    that stores the same as an earlier one is left out."""
    found = [Store("f32", EngineConfig(model="-"))]
    for half in get_args(HalfType):
        found.append(Store(half, EngineConfig(model="-", mixed_precision=MixedPrecision(dtype=half))))
    for format in filter(FORMATS.__contains__, get_args(WeightFormat)):  # the others are for GPUs
        for group in (*GROUPS[format], None):
            wanted = Quantization(format=format, group=group)
            found.append(Store(str(wanted), EngineConfig(model="-", quantization=wanted)))
    probe = _linear_graph(_PANEL, HIDDEN, 1)
    seen: dict[tuple[str, int], Store] = {}
    for store in found:
        weight = store.apply(probe).weights["layer.w0"]
        seen.setdefault((weight.format, weight.group), store)
    return list(seen.values())


def sparse_stores() -> list[Store]:
    """Pruned weights without their zeros, in every format that can leave them out."""
    pruned = SparseWeights(count=True)
    return [
        Store(f"{store.name}-sparse-{sparsity}", replace(store.config, sparse_weights=pruned), sparsity)
        for store in stores()
        if store.name in [format for format, _ in SPARSE_FORMATS]
        for sparsity in _SPARSITIES
    ]


def limit_of(format: str) -> str:
    """The probed peak (a field of Rates) that multiplying in a storage format is held against."""
    if format in ("f32", "f16"):
        return "fp32_gmacs"
    return "bf16_gmacs" if format == "bf16" else "int8_gmacs"


def benches(wanted: Callable[[str], bool], cold: int) -> Iterator[Bench]:
    """Benches that have a case whose name is wanted, with those cases alone, built one by one.

    cold: bytes that weights and KV should exceed, so that no cache holds them from one run to the next:
    an op that has fewer is repeated within the graph.
    """
    for make in (
        _linear_benches, _attention_benches, _row_benches, _expert_benches, _sampling_benches, _layer_benches
    ):  # fmt: skip
        for names, build in make(cold):
            if any(map(wanted, names)):
                bench = build()
                yield replace(bench, cases=tuple(c for c in bench.cases if wanted(c.name)))


_Lazy = tuple[list[str], Callable[[], Bench]]


def _linear_graph(n: int, k: int, copies: int) -> Graph:
    b = Builder("linear", "bench")
    x = b.op("embed", "ids", weights=(b.tensor("x", "x", max(ROWS), k),), scale=1.0, out="x_in")
    with b.scope("layer"):
        for i in range(copies):
            y = b.linear(x, b.tensor(f"w{i}", f"w{i}", n, k))
    return _finish(b, y)


def _linear_benches(cold: int) -> Iterator[_Lazy]:
    layers = {**_LAYERS, "head": (VOCAB, HIDDEN)}
    for store in (*stores(), *sparse_stores()):
        for layer, (n, k) in layers.items():
            rows = [m for m in ROWS if layer != "head" or m <= _SAMPLED]
            place = f"{store.name}/{layer}-{n}x{k}"
            prepares = layer in ("q", "down") and store.sparsity is None  # once for each width
            names = [f"linear/{place}/m{m}" for m in rows]
            names += [f"prepare/{place}/m{m}" for m in rows] if prepares else []

            def build(store: Store = store, n: int = n, k: int = k, names: list[str] = names) -> Bench:
                one = store.apply(_linear_graph(n, k, 1)).weights["layer.w0"]
                copies = _copies(weight_bytes(one), cold)
                graph = store.apply(_linear_graph(n, k, copies))
                cases = []
                for name in names:
                    op, m = name.partition("/")[0], int(name.rpartition("/m")[2])
                    work = _work(graph, "linear", m) if op == "linear" else Work(0.0, 4.0 * m * k, 0.0)
                    cases.append(Case(name, op, ((m, 0),), work))
                return Bench(one.format, graph, tuple(cases), sparsity=store.sparsity)

            yield names, build


def _attention_graph(layers: int) -> Graph:
    b = Builder("attention", "bench")
    width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    q, k, v = (
        b.op("embed", "ids", weights=(b.tensor(name, name, max(ROWS), w),), scale=1.0, out=f"{name}_in")
        for name, w in zip("qkv", width, strict=True)
    )
    for layer in range(layers):
        kv = b.op("kv_write", k, v, layer=layer, head_dim=HEAD_DIM)
        y = b.op(
            "attention", q, kv, layer=layer, heads=HEADS, head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5,
            window=None, softcap=None,
        )  # fmt: skip
    return _finish(b, y, (KVGroup("full", tuple(range(layers)), KV_HEADS, HEAD_DIM),))


_MOST_MATERIALISED = 512  # tokens; the scores of 4096 would take 2 GiB


def _attention_benches(cold: int) -> Iterator[_Lazy]:
    steps: dict[str, tuple[tuple[int, int], ...]] = {
        **{f"decode/c{c}/s{s}": ((1, c - 1),) * s for c in (1024, 8192) for s in (1, 16)},
        **{f"prefill/c{c}/m{m}": ((m, c - m),) for c, m in ((512, 512), (4096, 512), (4096, 4096))},
    }
    for dtype in filter(FORMATS.__contains__, get_args(KVType)):
        for step, spans in steps.items():
            names = [f"attention/{dtype}/{step}", f"kv_write/{dtype}/{step}"]
            tokens = sum(count for count, _ in spans)

            def build(
                dtype: str = dtype,
                spans: tuple[tuple[int, int], ...] = spans,
                names: list[str] = names,
                flash: bool = True,
            ) -> Bench:
                seen = sum(count + start for count, start in spans)
                per_token = kv_page_bytes(_attention_graph(1), _PAGE, dtype) / _PAGE
                layers = _copies(per_token * seen, cold)
                graph = _attention_graph(layers)
                read, tokens = per_token * seen, sum(count for count, _ in spans)
                pairs = sum(count * start + count * (count + 1) / 2 for count, start in spans)
                attend = _work(graph, "attention", tokens, A=pairs)
                moved = layers * read + attend.moved
                scores = layers * HEADS * pairs * 16  # written and read, and again as probabilities
                works = {
                    "attention": Work(layers * read, moved, attend.macs),
                    "attention_materialised": Work(layers * read, moved + scores, attend.macs),
                    "kv_write": Work(0.0, layers * tokens * (per_token + 8 * KV_HEADS * HEAD_DIM), 0.0),
                }
                cases = [
                    Case(name, op, spans, works[op]) for name in names for op in [name.partition("/")[0]]
                ]
                table = -(-max(count + start for count, start in spans) // _PAGE)
                return Bench(dtype, graph, tuple(cases), kv_dtype=dtype, table=table, flash=flash)

            yield names, build
            if tokens <= _MOST_MATERIALISED:
                baseline = [f"attention_materialised/{dtype}/{step}"]
                yield baseline, partial(build, names=baseline, flash=False)


def _row_benches(cold: int) -> Iterator[_Lazy]:
    """Ops over rows: small, and in a cache as they are in a model."""

    def rows(op: str, graph: Callable[[], Graph], place: str = "", format: str = "f32") -> _Lazy:
        names = [f"{op}{place}/m{m}" for m in ROWS]

        def build() -> Bench:
            made = graph()
            return Bench(
                format,
                made,
                tuple(
                    Case(name, op, ((m, 0),), _work(made, op, m)) for name, m in zip(names, ROWS, strict=True)
                ),
            )

        return names, build

    def one(op: str, width: int, inputs: int, vector: int = 0, **attrs: Any) -> Callable[[], Graph]:
        def graph() -> Graph:
            b = Builder(op, "bench")
            ins = [
                b.op("embed", "ids", weights=(b.tensor(f"x{i}", f"x{i}", max(ROWS), width),), scale=1.0)
                for i in range(inputs)
            ]
            weights = (b.weight("v", Constant((0.5,) * vector)),) if vector else ()
            return _finish(
                b, b.op(op, *ins, *(["positions"] if op == "rope" else []), weights=weights, **attrs)
            )

        return graph

    yield rows("rms_norm", one("rms_norm", HIDDEN, 1, HIDDEN, eps=1e-5))
    yield rows("rope", one("rope", HEADS * HEAD_DIM, 1, HEAD_DIM // 2, head_dim=HEAD_DIM, magnitude=1.0))
    yield rows("act_mul", one("act_mul", MLP, 2, act="silu"))
    yield rows("add", one("add", HIDDEN, 2))
    for store in stores():

        def table(store: Store = store) -> Graph:
            b = Builder("embed", "bench")
            name = b.tensor("table", "table", VOCAB, HIDDEN)
            return store.apply(_finish(b, b.op("embed", "ids", weights=(name,), scale=1.0)))

        yield rows("embed", table, f"/{store.name}", store.name.partition("-")[0])


def _expert_graph() -> Graph:
    b = Builder("experts", "bench")
    x = b.op("embed", "ids", weights=(b.tensor("x", "x", max(ROWS), HIDDEN),), scale=1.0)
    logits = b.linear(x, b.tensor("router", "router", _EXPERTS, HIDDEN), out="logits_in")
    chosen = b.ops("top_k_experts", logits, k=_CHOSEN, renormalise=True, out=("chosen", "gains"))
    shapes = {
        "gate": (_EXPERT_MLP, HIDDEN), "up": (_EXPERT_MLP, HIDDEN), "down": (HIDDEN, _EXPERT_MLP)
    }  # fmt: skip
    stacks = [
        b.weight(name, Stack(tuple(Tensor(f"{name}.{e}", shape) for e in range(_EXPERTS))))
        for name, shape in shapes.items()
    ]
    return _finish(b, b.op("experts", x, *chosen, weights=tuple(stacks), act="silu"))


def _expert_benches(cold: int) -> Iterator[_Lazy]:
    for store in stores():
        names = [f"experts/{store.name}/{_CHOSEN}of{_EXPERTS}/m{m}" for m in ROWS]

        def build(store: Store = store, names: list[str] = names) -> Bench:
            graph = store.apply(_expert_graph())
            cases = []
            for name, m in zip(names, ROWS, strict=True):
                distinct = _EXPERTS * (1 - (1 - _CHOSEN / _EXPERTS) ** m)  # expected under random routing
                cases.append(Case(name, "experts", ((m, 0),), _work(graph, "experts", m, E=distinct)))
            return Bench(store.name.partition("-")[0], graph, tuple(cases))

        yield names, build


def _sampling_benches(cold: int) -> Iterator[_Lazy]:
    ways: dict[str, dict[str, float]] = {
        "greedy": {"temperature": 0.0, "top_p": 1.0},
        "temperature": {"temperature": 0.8, "top_p": 1.0},
        "top_k50": {"temperature": 0.8, "top_p": 1.0, "top_k": 50},
        "top_p0.9": {"temperature": 0.8, "top_p": 0.9},
    }
    assert all(field in (SAMPLE_ROW.names or ()) for way in ways.values() for field in way)
    sizes = [m for m in ROWS if m <= _SAMPLED]
    names = [f"sample/{way}/m{m}" for way in ways for m in sizes]

    def build() -> Bench:
        b = Builder("sample", "bench")
        # Random tables are uniform with width sqrt(3 / columns): this spreads the logits over 20.
        scale = 20.0 / (3.0 / VOCAB) ** 0.5
        logits = b.op("embed", "ids", weights=(b.tensor("x", "x", _SAMPLED, VOCAB),), scale=scale)
        cases = [
            Case(f"sample/{way}/m{m}", "sample", ((m, 0),), Work(0.0, 4.0 * m * VOCAB, 0.0), fields)
            for way, fields in ways.items()
            for m in sizes
        ]
        return Bench("f32", _finish(b, logits, vocab=VOCAB), tuple(cases))

    yield names, build


def _layer_benches(cold: int) -> Iterator[_Lazy]:
    """Whole layers after every pass, as the product runs them: what fusion makes of the ops above. Up to 32
    rows are sequences that decode at 128 tokens, more are one prompt."""
    for store in stores():
        names = [f"layer/{store.name}/m{m}" for m in ROWS]

        def build(store: Store = store, names: list[str] = names) -> Bench:
            def model(layers: int) -> Graph:
                config = _MODEL | {"num_hidden_layers": layers}
                return run_passes(build_graph(config), store.config)[0]

            layers = _copies(step_costs(model(1), store.config.kv_dtype).matrix_bytes, cold)
            graph = model(layers)
            costs = step_costs(graph, store.config.kv_dtype)
            cases = []
            for name, m in zip(names, ROWS, strict=True):
                spans = ((1, 127),) * m if m <= _SAMPLED else ((m, 0),)
                read = costs.weight_bytes(m) + costs.kv_bytes(sum(span) for span in spans)
                cases.append(Case(name, "layer", spans, Work(read, read, costs.macs(m, m))))
            format = store.name.partition("-")[0]
            return Bench(format, graph, tuple(cases), store.config.kv_dtype, table=max(ROWS) // _PAGE)

        yield names, build


def _finish(b: Builder, value: str, kv: tuple[KVGroup, ...] = (), vocab: int = max(ROWS)) -> Graph:
    return b.finish(
        outputs={"logits": value}, vocab=vocab, hidden=HIDDEN, layers=1, max_positions=1 << 17, kv_groups=kv
    )


def _copies(size: float, cold: int) -> int:
    return max(1, -(-cold // int(size)))


def _work(graph: Graph, op: str, tokens: int, **dims: float) -> Work:
    """Cost of all nodes of an op for a step. What does not grow with the tokens is what memory must give."""
    amounts = {"1": 1.0, "T": float(tokens), "R": float(tokens), **dims}
    read = moved = macs = 0.0
    for node in graph.nodes:
        if node.op != op or (op == "embed" and node.outputs[0] != graph.outputs["logits"]):
            continue
        cost = node_cost(graph, node)
        macs += sum(f * amounts[d] for d, f in cost.flops.items()) / 2
        moved += sum(f * amounts.get(d, 0.0) for d, f in cost.bytes.items())
        read += sum(f * amounts[d] for d, f in cost.bytes.items() if d in ("1", "E"))
    return Work(read, moved, macs if op in ("linear", "attention", "experts") else 0.0)
