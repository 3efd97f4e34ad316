"""Weight expressions: evaluated row by row, inverted, made up, and packed through the cache."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer import _native
from gossamer.backends.cpu import packing
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.checkpoint.safetensors_writer import write_safetensors
from gossamer.checkpoint.weights import DummySource, check_tensors, evaluate, gather, invert
from gossamer.errors import CheckpointError
from gossamer.graph.families import build_graph
from gossamer.graph.weights import (
    Concat,
    Constant,
    Shift,
    Slice,
    Stack,
    Tensor,
    Transpose,
    WeightExpr,
    leaves,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


class Source:
    """Tensors of random numbers, made at first use."""

    def __init__(self) -> None:
        self.tensors: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def read(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            rng = np.random.default_rng(len(self.tensors))
            self.tensors[name] = rng.standard_normal(self.shapes[name]).astype(np.float32)
        return self.tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.read(name)[start:stop]

    def release(self, name: str) -> None:
        """Nothing to let go."""

    def content_key(self) -> str:
        return "random"


@st.composite
def expressions(draw: st.DrawFn) -> WeightExpr:
    counter = iter(range(100))

    def tensor(rows: int, columns: int) -> Tensor:
        return Tensor(f"t{next(counter)}", (rows, columns))

    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    kind = draw(st.sampled_from(["tensor", "slice0", "slice1", "transpose", "shift", "concat", "stack"]))
    if kind == "slice0":
        start = draw(st.integers(0, 3))
        return Slice(tensor(rows + 5, columns), 0, start, start + rows)
    if kind == "slice1":
        start = draw(st.integers(0, 3))
        return Slice(tensor(rows, columns + 5), 1, start, start + columns)
    if kind == "transpose":
        return Transpose(tensor(columns, rows))
    if kind == "shift":
        return Shift(tensor(rows, columns), 1.0)
    if kind == "concat":
        return Concat(tuple(tensor(draw(st.integers(1, 4)), columns) for _ in range(draw(st.integers(1, 3)))))
    if kind == "stack":
        return Stack(tuple(tensor(rows, columns) for _ in range(draw(st.integers(1, 3)))))
    return tensor(rows, columns)


def source_for(expr: WeightExpr) -> Source:
    source = Source()
    source.shapes = {leaf.name: leaf.shape for leaf in leaves(expr)}
    return source


@settings(max_examples=150, deadline=None)
@given(expressions(), st.data())
def test_rows_are_rows_of_the_whole(expr: WeightExpr, data: st.DataObject) -> None:
    source = source_for(expr)
    whole = evaluate(expr, source)
    assert whole.shape == expr.shape
    start = data.draw(st.integers(0, expr.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, expr.shape[0]))
    assert np.array_equal(evaluate(expr, source, start, stop), whole[start:stop])


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_inverse_gives_back_what_was_read(expr: WeightExpr) -> None:
    source = source_for(expr)
    for part in invert(expr, evaluate(expr, source)):
        index = (slice(None),) * part.axis + (slice(part.start, part.stop),)
        assert np.allclose(part.array, source.read(part.tensor.name)[index], atol=1e-6)


def test_slices_of_one_tensor_are_put_together_again() -> None:
    fused = Tensor("qkv", (10, 3))
    exprs = [Slice(fused, 0, 0, 4), Slice(fused, 0, 4, 7), Slice(fused, 0, 7, 10)]
    source = source_for(fused)

    def parts(some: list[Slice]) -> Iterator[object]:
        for e in some:
            yield from invert(e, evaluate(e, source))

    assert np.array_equal(gather(parts(exprs[::-1]))["qkv"], source.read("qkv"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="qkv"):
        gather(parts(exprs[:2]))  # type: ignore[arg-type]


def test_constants_need_no_checkpoint() -> None:
    assert evaluate(Constant((1.0, 2.0)), Source()).tolist() == [1.0, 2.0]
    assert list(invert(Constant((1.0,)), np.ones(1))) == []


def test_missing_and_misshapen_tensors_are_named() -> None:
    graph = build_graph(CONFIG)
    shapes = {leaf.name: leaf.shape for w in graph.weights.values() for leaf in leaves(w.expr)}
    check_tensors(graph, shapes)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=name):
        check_tensors(graph, {k: v for k, v in shapes.items() if k != name})
    with pytest.raises(CheckpointError, match=r"\(3, 3\).*\(96, 64\)"):
        check_tensors(graph, shapes | {name: (3, 3)})


def test_dummy_weights_are_deterministic_and_any_rows_can_be_made_alone() -> None:
    graph = build_graph(CONFIG | {"vocab_size": 40000})
    one, two = DummySource(graph), DummySource(graph)
    name = "model.embed_tokens.weight"
    whole = one.read(name)
    assert np.array_equal(two.read_rows(name, 20000, 30001), whole[20000:30001])
    assert not np.array_equal(whole, one.read("lm_head.weight"))
    assert abs(one.read("model.norm.weight").mean() - 1) < 0.1


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_loading_holds_one_tensor_beside_the_weights(tmp_path: Path, architecture: str) -> None:
    sizes = {"n_embd": 256, "n_head": 4, "n_layer": 3, "vocab_size": 4096, "n_positions": 64}
    llama = CONFIG | {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096}
    config = llama if architecture.startswith("Llama") else sizes
    graph = build_graph(config | {"architectures": [architecture]})
    made = DummySource(graph)
    shapes = {leaf.name: leaf.shape for w in graph.weights.values() for leaf in leaves(w.expr)}
    tensors = {name: made.read(name).astype(ml_dtypes.bfloat16) for name in shapes}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    del tensors
    source, pool = Checkpoint(tmp_path), _native.Pool(1)
    places, size = packing.layout(graph)
    block = _native.allocate(size)
    tracemalloc.start()
    try:
        packing.fill_block(graph, source, pool, block, places)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest = 4 * max(math.prod(shape) for shape in shapes.values())
    assert largest / 2 < peak < largest + (1 << 20) < size
