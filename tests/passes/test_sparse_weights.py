"""Sparse weights from the configuration to the receipt: what turns them on, what is refused, and that no bit
changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.backends.cpu import packing
from gossamer.checkpoint.codes import Codes
from gossamer.checkpoint.model_writer import write_weights
from gossamer.checkpoint.sparsity import with_nonzeros
from gossamer.checkpoint.weights import DummySource, as_stored
from gossamer.config import EngineConfig, MixedPrecision, Quantization, SparseWeights
from gossamer.config.sparse_weights import parse_sparsity
from gossamer.errors import ConfigError
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph, Weight
from gossamer.graph.text import graph_text
from gossamer.graph.weights import Concat, Slice, Stack, Tensor, Transpose, WeightExpr, leaves
from gossamer.passes.pipeline import run_passes
from gossamer.runtime.start import start
from tests.checkpoint.test_compressed_tensors_reader import sparse as sparse_tensor
from tests.cli.conftest import Cli, cli
from tests.exactness import test_bits
from tests.exactness.models import CONFIG
from tests.numerics.test_codes import Coded
from tests.passes.test_weight_formats import DENSE

__all__ = ["cli"]

INT8 = Quantization(format="int8")


def counted(sparsity: str | None = "0.5", **count: bool) -> Graph:
    graph = build_graph(DENSE)
    return with_nonzeros(graph, DummySource(graph, sparsity), **(count or {"count": True}))


def passed(graph: Graph, **options: Any) -> Graph:
    return run_passes(graph, EngineConfig(model="m", **options))[0]


def sparse_names(graph: Graph) -> set[str]:
    return {name for name, weight in graph.weights.items() if weight.sparse}


@pytest.mark.parametrize("options", [{"quantization": INT8}, {"mixed_precision": MixedPrecision()}])
def test_matrices_of_enough_zeros_leave_them_out(options: dict[str, Any]) -> None:
    graph = counted()
    after = passed(graph, sparse_weights=SparseWeights(count=True), **options)
    blocks = {w for n in graph.nodes if n.scope and n.op == "linear" for w in n.weights}
    assert sparse_names(after) == blocks  # embedding and head were not pruned
    format = after.weights[next(iter(blocks))].format
    assert f"<{format}-sparse[" in graph_text(after)
    assert not sparse_names(passed(graph, sparse_weights=None, **options))
    dense = packing.layout(passed(graph, sparse_weights=None, **options))[1]
    assert packing.layout(after)[1] < dense
    ops = [node.op for node in after.nodes]
    assert "merged_linear" in ops and "gated_linear" in ops  # fusion goes on as before


def test_what_is_declared_needs_no_asking_and_what_is_not_is_not_read() -> None:
    graph = build_graph(DENSE)
    source = DummySource(graph, "2:4")
    assert not sparse_names(passed(with_nonzeros(graph, source), quantization=INT8))
    name = "model.layers.0.mlp.up_proj.weight"
    source.nonzeros = lambda tensor: 96 * 64 // 2 if tensor == name else None  # type: ignore[method-assign]
    declared = with_nonzeros(graph, source)
    assert sparse_names(passed(declared, quantization=INT8)) == {"layers.0.mlp.up_proj"}
    assert not sparse_names(passed(declared, quantization=Quantization(format="int4")))  # nobody asked
    mixed = passed(declared, quantization=INT8)  # a dense gate beside a sparse up
    assert sum(node.op == "gated_linear" for node in mixed.nodes) == mixed.layers - 1


@pytest.mark.parametrize(
    ("graph", "options", "message"),
    [
        (counted, {"quantization": Quantization(format="int4")}, "% zeros, and int4-g32 cannot leave them"),
        (counted, {"quantization": Quantization(format="int8", group=16)}, "int8-g16 cannot"),
        (counted, {}, "f32 cannot leave them out; int8 .* and bf16 can"),
        (lambda: counted(None), {"quantization": INT8}, r"no matrix is 40 % zeros \(.* 0.0 %\)"),
        (lambda: counted("0.2"), {"quantization": INT8}, "lower sparse_weights.least"),
        (lambda: build_graph(DENSE), {"quantization": INT8}, "nobody counted the zeros"),
    ],
)  # fmt: skip
def test_what_was_asked_for_and_cannot_be_is_refused(
    graph: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        passed(graph(), sparse_weights=SparseWeights(count=True), **options)


@pytest.mark.parametrize("text", ["1.5", "-0.1", "half", "nan", "4:2", "0:4", "2:", ""])
def test_spellings_of_sparsity_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_sparsity(text)


def test_mistakes_in_the_configuration() -> None:
    assert parse_sparsity("0.5") == (0.5, None) and parse_sparsity("2:4") == (0.5, (2, 4))
    with pytest.raises(ConfigError, match=r"1\.5 is not a share"):
        SparseWeights(least=1.5)
    with pytest.raises(ConfigError, match="with --load-format dummy"):
        EngineConfig(model="m", dummy_sparsity="0.5")
    with pytest.raises(ConfigError, match=r"gossamer.config.SparseWeights\(...\) turns it on"):
        EngineConfig(model="m", sparse_weights=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("sparsity", "share"), [("0.5", 0.5), ("0.9", 0.9), ("2:4", 0.5), ("3:8", 0.625)])
def test_dummy_weights_have_the_zeros_that_were_asked_for(sparsity: str, share: float) -> None:
    graph = build_graph(CONFIG)
    source, dense = DummySource(graph, sparsity), DummySource(graph)
    name = "model.layers.1.mlp.gate_proj.weight"
    w = source.read(name)
    assert abs((w == 0).mean() - share) < (0.02 if ":" not in sparsity else 1e-9)
    if ":" in sparsity:
        kept, of = parse_sparsity(sparsity)[1] or (0, 1)
        assert ((w.reshape(-1, of) != 0).sum(1) == kept).all()
    assert np.array_equal(w[w != 0], dense.read(name)[w != 0])
    assert np.array_equal(source.read_rows(name, 3, 77), w[3:77])
    for whole in ("model.embed_tokens.weight", "model.norm.weight"):
        assert np.array_equal(source.read(whole), dense.read(whole))
    assert source.content_key() != dense.content_key()


def test_any_expression_is_counted() -> None:
    random = np.random.default_rng(0)
    codes = Codes(
        format="int8", group=0, codes=random.integers(-1, 2, (24, 32)).astype(np.int8),
        scales=np.where(random.random((24, 1)) < 0.5, 0, 1).astype(np.float32),
    )  # fmt: skip
    a, b = (np.where(random.random((24, 32)) < 0.6, -0.0, 1).astype(np.float32) for _ in range(2))
    source = Coded({"a": a, "b": b}, {"c": codes})
    source.nonzeros = lambda name: None  # type: ignore[attr-defined]
    ta, tb, tc = (Tensor(name, (24, 32)) for name in "abc")
    cases: list[tuple[WeightExpr, tuple[int, ...]]] = [
        (ta, ((a != 0).sum(),)),
        (Slice(ta, 0, 5, 20), ((a[5:20] != 0).sum(),)),
        (Slice(Transpose(tb), 0, 3, 30), ((b.T[3:30] != 0).sum(),)),
        (Concat((ta, tb)), ((a != 0).sum() + (b != 0).sum(),)),
        (Stack((ta, tb)), ((a != 0).sum(), (b != 0).sum())),
        (tc, ((codes.codes != 0).sum(),)),  # as they are packed, whatever their scales
    ]
    for expr, want in cases:
        base = build_graph(DENSE)
        one = replace(base, weights={"w": Weight("w", expr.shape, expr)})
        (weight,) = with_nonzeros(as_stored(one, source), source, count=True).weights.values()
        assert weight.nonzeros == want


@pytest.mark.parametrize("format", ["int8", "bf16"])
def test_a_request_gets_the_same_bits_from_fewer_bytes(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        (tuple(range(1, 40)), test_bits.SamplingParams(temperature=0.0, max_tokens=9, logprobs=2)),
        ((5, 6, 7), test_bits.SamplingParams(temperature=0.9, seed=3, max_tokens=9, logprobs=2)),
    ]
    options: dict[str, Any] = {"dummy_sparsity": "0.5"}
    dense = test_bits.run(requests, format, sparse_weights=None, **options)
    assert test_bits.run(requests, format, sparse_weights=SparseWeights(count=True), **options) == dense


def test_the_receipt_names_the_kernels_and_the_bytes_that_moved(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def lines(asked: SparseWeights | None) -> tuple[int, dict[str, int]]:
        config = EngineConfig(
            model=str(tmp_path), load_format="dummy", dummy_sparsity="2:4", quantization=INT8,
            sparse_weights=asked, max_model_len=64,
        )  # fmt: skip
        started = start(config)
        found: dict[str, int] = {}
        for line in started.receipt():
            found[line.kernel] = found.get(line.kernel, 0) + line.weight_bytes
        return started.memory.weights, found

    before, plain = lines(None)
    after, found = lines(SparseWeights(count=True))
    for kernel in ("merged_linear", "gated_linear", "linear_add"):
        assert f"{kernel}_int8_sparse" in found and f"{kernel}_int8" not in found
        assert found[f"{kernel}_int8_sparse"] < 0.8 * plain[f"{kernel}_int8"]
    assert found["linear_int8"] == plain["linear_int8"]  # the head was not pruned
    moved = sum(plain.values()) - sum(found.values())
    assert after < before and abs((before - after) - moved) < 8192


def test_a_checkpoint_that_declares_its_zeros_is_served_without_them(tmp_path: Path) -> None:
    """compressed-tensors' bitmask, of floats: nobody asks, and sparse_weights=None serves it densely."""
    graph = build_graph(CONFIG)
    source = DummySource(graph, "0.5")
    tensors: dict[str, np.ndarray] = {}
    for weight in graph.weights.values():
        for leaf in leaves(weight.expr):
            array = source.read(leaf.name)
            if leaf.name.endswith("proj.weight"):
                tensors |= {f"{leaf.name}.{part}": v for part, v in sparse_tensor(array, False).items()}
            else:
                tensors[leaf.name] = array
    settings = {"format": "sparse-bitmask", "targets": ["Linear"], "sparsity_structure": "unstructured"}
    quantized = {"quant_method": "compressed-tensors", "sparsity_config": settings}
    write_weights(tmp_path, tensors)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantized}))

    def served(**options: Any) -> set[str]:
        config = EngineConfig(model=str(tmp_path), max_model_len=64, quantization=INT8, **options)
        return {line.kernel for line in start(config).receipt()}

    assert {"merged_linear_int8_sparse", "gated_linear_int8_sparse", "linear_int8"} <= served()
    assert not any("sparse" in kernel for kernel in served(sparse_weights=None))


def test_the_flags(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    bench = (
        "bench", "latency", str(tmp_path), "--load-format", "dummy", "--dummy-sparsity", "0.5", "-q", "int8",
        "--input-len", "4", "--output-len", "2", "--num-iters", "1", "--json",
    )  # fmt: skip
    dense, sparse = cli(*bench, "--no-sparse-weights"), cli(*bench, "--sparse-weights")
    assert sparse.json["memory"]["weights_bytes"] < dense.json["memory"]["weights_bytes"]
    assert sparse.json["decode_bytes"] < dense.json["decode_bytes"]
    assert "without zeros" in sparse.err and "without zeros" not in dense.err
    assert "cannot leave them out" in cli(*bench, "-q", "int4", "--sparse-weights").complaint
