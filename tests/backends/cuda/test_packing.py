"""Weights on the device: the bits of the specification, the layout, and the bytes that were announced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from gossamer.backends.cuda.packing import PackedWeight, pack, packed_bytes, side_by_side
from gossamer.checkpoint.codes import Codes
from gossamer.checkpoint.weights import as_stored
from gossamer.errors import CheckpointError, ConfigError, NotBuiltError
from gossamer.graph.ir import Weight
from gossamer.graph.ops.formats import NF4, round_weight
from gossamer.graph.weights import Shift, Stack, Tensor, Transpose
from tests.numerics.harness import Arrays, OpGraph

GROUPED = [
    ("int8", 16), ("int8", 32), ("int4", 32), ("int4", 128), ("uint4", 32), ("uint4", 64), ("nf4", 64),
    ("nf4", 32),
]  # fmt: skip
FORMATS = [("f32", 0), ("f16", 0), ("bf16", 0), ("int8", 0), ("fp8", 0), *GROUPED]
KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "usual": lambda w: w,
    "zero": np.zeros_like,
    "positive": lambda w: np.abs(w) + 1,
    "tiny": lambda w: 1e-9 * w,
    "one weight": lambda w: np.where(np.arange(w.shape[1]) == 20, w, 0),
}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def floats(packed: PackedWeight) -> torch.Tensor:
    """The values [.., K] that the layout stands for, float32, on the CPU."""
    data, k = packed.data.cpu(), packed.shape[-1]
    if packed.scales is None:
        return data.float()
    scales = packed.scales.cpu().float()
    if not packed.group:
        return data.float() * scales[..., None]
    if data.dtype == torch.uint8:
        data = torch.stack([data & 15, data >> 4], -1).flatten(-2)
    values = data.unflatten(-1, (-1, packed.group)).float()
    if packed.format == "int4":
        values -= 8
    if packed.format == "nf4":
        values = torch.tensor(NF4, dtype=torch.float32)[values.long()]
    if packed.zeros is not None:
        values -= packed.zeros.cpu().float()[..., None]
    return (values * scales[..., None]).flatten(-2)[..., :k]


def one(w: np.ndarray, format: str, group: int, device: torch.device) -> tuple[Weight, PackedWeight]:
    """A matrix that a linear op reads, packed."""
    g = OpGraph()
    y = g.builder.linear(g.input("x", random(3, w.shape[1])), g.weight("w", w))
    graph = g.finish(y, formats={"w": (format, group)})
    return graph.weights["w"], pack(graph, Arrays(g.arrays), device)["w"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_numbers_are_the_specification_s(format: str, group: int, kind: str, device: torch.device) -> None:
    w = KINDS[kind](random(5, 3 * max(group, 16) // 2 + 5)).astype(np.float32)
    weight, packed = one(w, format, group, device)
    assert torch.equal(floats(packed), round_weight(torch.from_numpy(w), format, group))
    held = [t for t in (packed.data, packed.scales, packed.zeros) if t is not None]
    assert packed_bytes(weight) == sum(t.nbytes for t in held)
    assert all(t.is_contiguous() for t in held) and packed.shape == w.shape


def test_even_columns_lie_in_the_low_halves(device: torch.device) -> None:
    w = np.tile(np.arange(-8, 8, dtype=np.float32), (1, 2))
    data = one(w, "int4", 32, device)[1].data.cpu()
    assert data[0, :3].tolist() == [0x10, 0x32, 0x54]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_any_float_of_a_checkpoint(dtype: type, device: torch.device) -> None:
    w = random(4, 40).astype(dtype)
    w.flags.writeable = False
    g = OpGraph()
    y = g.builder.linear(g.input("x", random(3, 40)), g.weight("w", random(4, 40)))
    graph = g.finish(y, formats={"w": ("int4", 32)})
    packed = pack(graph, Arrays({**g.arrays, "w": w}), device)["w"]
    assert torch.equal(floats(packed), round_weight(torch.from_numpy(w.astype(np.float32)), "int4", 32))


def test_expressions_and_experts(device: torch.device) -> None:
    """A transposed matrix, a shifted norm and a stack, each as the reference evaluates it."""
    g = OpGraph()
    experts, ups, downs = random(3, 6, 8), random(3, 6, 8, seed=1), random(3, 8, 6, seed=2)
    g.arrays = {"t": random(8, 4), "norm": random(8), **{f"e{i}": experts[i] for i in range(3)}}
    g.arrays |= {f"u{i}": ups[i] for i in range(3)} | {f"d{i}": downs[i] for i in range(3)}
    x = g.input("x", random(2, 8))
    normed = g.builder.op(
        "rms_norm", x, weights=(g.builder.weight("n", Shift(Tensor("norm", (8,)), 1.0)),), eps=1e-6
    )
    router = g.weight("router", random(3, 8))
    ids, gains = g.builder.ops("top_k_experts", g.builder.linear(normed, router), k=2, renormalise=True)
    stacks = tuple(
        g.builder.weight(name, Stack(tuple(Tensor(f"{name}{i}", shape) for i in range(3))))
        for name, shape in (("e", (6, 8)), ("u", (6, 8)), ("d", (8, 6)))
    )
    mixed = g.builder.op("experts", normed, ids, gains, weights=stacks, act="silu")
    y = g.builder.linear(mixed, g.builder.weight("w", Transpose(Tensor("t", (8, 4)))))
    graph = g.finish(y, formats={"e": ("uint4", 32), "d": ("int8", 0)})
    source = Arrays(g.arrays)
    seen: list[tuple[int, int]] = []
    packed = pack(graph, source, device, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(packed["w"].data.cpu(), torch.from_numpy(g.arrays["t"].T))
    assert torch.equal(packed["n"].data.cpu(), torch.from_numpy(g.arrays["norm"] + np.float32(1)))
    for name, planes in (("e", experts), ("u", ups), ("d", downs)):
        want = round_weight(torch.from_numpy(planes), graph.weights[name].format, graph.weights[name].group)
        assert torch.equal(floats(packed[name]), want)
        assert packed[name].part(1).shape == planes.shape[1:]
    assert seen[-1] == (sum(map(packed_bytes, graph.weights.values())),) * 2


class Stored(Arrays):
    """A checkpoint that stores one matrix as integers."""

    def __init__(self, arrays: dict[str, np.ndarray], name: str, codes: Codes) -> None:
        super().__init__(arrays)
        self._name, self._codes = name, codes

    def stored(self, name: str) -> tuple[str, int]:
        return (self._codes.format, self._codes.group) if name == self._name else ("f32", 0)

    def read_codes(self, name: str, start: int, stop: int) -> Codes:
        return self._codes.rows(start, stop)


@pytest.mark.parametrize(("format", "group"), [("int8", 0), *GROUPED])
def test_integers_of_a_checkpoint_are_laid_out_as_they_are(
    format: str, group: int, device: torch.device
) -> None:
    n, k = 5, 2 * group + 3 if group else 21
    random_ = np.random.default_rng(3)
    low, high = {"int8": (-128, 128), "int4": (-8, 8)}.get(format, (0, 16))
    groups = -(-k // group) if group else 1
    codes = Codes(
        format=format,
        group=group,
        codes=random_.integers(low, high, (n, k), np.int8),
        scales=random_.random((n, groups)).astype(np.float16).astype(np.float32),
        zeros=random_.integers(0, 16, (n, groups), np.uint8) if format == "uint4" else None,
    )
    g = OpGraph()
    y = g.builder.linear(g.input("x", random(3, k)), g.weight("w", random(n, k)))
    source = Stored(g.arrays, "w", codes)
    packed = pack(as_stored(g.finish(y), source), source, device)["w"]
    assert (packed.format, packed.group) == (format, group)
    assert torch.equal(floats(packed), torch.from_numpy(codes.floats()))


@pytest.mark.parametrize(("format", "group"), [("bf16", 0), ("int8", 0), ("fp8", 0), ("uint4", 32)])
def test_what_is_read_side_by_side_lies_so(format: str, group: int, device: torch.device) -> None:
    g = OpGraph()
    x = g.input("x", random(3, 40))
    names = [g.weight(f"w{i}", random(4 + i, 40, seed=i)) for i in range(3)]
    biases = [g.weight(f"b{i}", random(4 + i, seed=i)) for i in range(3)]
    y = g.builder.op("merged_linear", x, weights=(*names, *biases), parts=3)
    alone = g.builder.linear(x, g.weight("alone", random(5, 40)))
    others = (g.weight("v", random(2, 15)), g.weight("u", random(3, 15)))
    both = g.builder.op("merged_linear", y, weights=others, parts=2)
    graph = g.finish(g.builder.op("add", alone, both), formats=dict.fromkeys(names, (format, group)))
    packed = pack(graph, Arrays(g.arrays), device)
    ((whole, bias),) = side_by_side([packed[n] for n in names], [packed[b].data for b in biases])
    assert whole.shape == (15, 40) and bias is not None
    assert torch.equal(bias, torch.cat([packed[b].data for b in biases]))
    assert torch.equal(floats(whole), torch.cat([floats(packed[n]) for n in names]))
    apart = list(side_by_side([packed["w0"], packed["w2"], packed["alone"]], []))
    assert [run.shape[0] for run, _ in apart] == [4, 6, 5]
    reordered = list(side_by_side([packed["w0"], packed["w1"]], [packed["b1"].data, packed["b0"].data]))
    assert len(reordered) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_floats_are_refused(bad: float, device: torch.device) -> None:
    w = random(3, 32)
    w[1, 4] = bad
    with pytest.raises(CheckpointError, match="tensor w holds NaN or infinity"):
        one(w, "int4", 32, device)
    assert not one(w, "bf16", 0, device)[1].data.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"format": "int8", "sparse": True, "nonzeros": (4,)}, NotBuiltError, "--no-sparse-weights"),
        ({"format": "fp4"}, ConfigError, "no kernels for weights in fp4; it has them for f32, f16"),
        (
            {"format": "int4", "group": 16},
            ConfigError,
            "int4-g16; its groups of int4 are powers of two from 32",
        ),
        ({"format": "int4"}, ConfigError, "powers of two from 32"),
        ({"format": "int8", "group": 48}, ConfigError, "powers of two from 16"),
        ({"format": "bf16", "group": 32}, ConfigError, "its groups of bf16 are none"),
    ],
)
def test_what_no_kernel_reads_is_refused(
    changes: dict[str, object], error: type[Exception], words: str, device: torch.device
) -> None:
    g = OpGraph()
    y = g.builder.linear(g.input("x", random(2, 32)), g.weight("w", random(3, 32)))
    graph = g.finish(y)
    weight = replace(graph.weights["w"], **changes)  # type: ignore[arg-type]
    with pytest.raises(error, match=words):
        packed_bytes(weight)
    with pytest.raises(error, match=words):
        pack(replace(graph, weights={**graph.weights, "w": weight}), Arrays(g.arrays), device)
