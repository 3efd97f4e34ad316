"""Small models whose matrices are random codes, and what they are as floats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from gossamer import _native
from gossamer.backends.cpu.program import CpuProgram, StepShape
from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.codes import CodedTensor, Codes
from gossamer.checkpoint.compressed_tensors import write_compressed_tensors
from gossamer.config import EngineConfig
from gossamer.graph.ir import Graph
from gossamer.runtime.start import load_graph

IDS = torch.arange(3, 60, 3)[None]
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
Stored = tuple[str, int] | tuple[str, int, float]
"""Format, group and, where it is static, the scale of the inputs."""


def random_codes(format: str, group: int, n: int, k: int, seed: int) -> Codes:
    """Every integer that the format has; scales that fp16 holds, of weights around 0.05."""
    random = np.random.default_rng(seed)
    groups = k // group if group else 1
    low, high = {"int8": (-128, 128), "int4": (-8, 8)}.get(format, (0, 16))
    scales = np.abs(random.standard_normal((n, groups))) / (2000 if format == "int8" else 100)
    zeros = random.integers(0, 16, (n, groups)).astype(np.uint8) if format == "uint4" else None
    return Codes(
        format=format,
        group=group,
        codes=random.integers(low, high, (n, k)).astype(np.int8),
        scales=scales.astype(np.float16).astype(np.float32),
        zeros=zeros,
    )


def small_model(config: Any) -> Any:
    """A model of transformers' with random weights."""
    torch.manual_seed(0)
    name = type(config).__name__.removesuffix("Config") + "ForCausalLM"
    return getattr(transformers, name)(config).eval()


def config_json(model: Any) -> dict[str, Any]:
    """What config.json says of it."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return {**config, "architectures": [type(model).__name__], "dtype": "float32"}


def projections(model: Any) -> list[str]:
    """Matrices of attention and MLPs."""
    named = model.state_dict()
    return [n for n in named if n.endswith("_proj.weight") or ".experts." in n]


def encode(model: Any, stored: Sequence[Stored], names: Sequence[str]) -> dict[str, CodedTensor]:
    """Gives the named matrices random codes, one format after the other, and the model their floats."""
    state = model.state_dict()
    coded = {}
    for i, name in enumerate(names):
        format, group, *scale = stored[i % len(stored)]
        n, k = state[name].shape
        codes = random_codes(format, group, n, k, i)
        state[name] = torch.from_numpy(codes.floats())
        coded[name] = CodedTensor(
            format=format,
            group=group,
            shape=(n, k),
            make=lambda codes=codes: codes,  # type: ignore[misc]
            activation_scale=scale[0] if scale else None,
        )
    model.load_state_dict(state)
    return coded


def write(model: Any, coded: dict[str, CodedTensor], directory: Path) -> int:
    """The model as compressed-tensors, what is not coded as floats."""
    tied = model.config.tie_word_embeddings
    floats = {
        name: value.numpy()
        for name, value in model.state_dict().items()
        if name not in coded and not (tied and name == "lm_head.weight")
    }
    return write_compressed_tensors(directory, config_json(model), floats, coded)


def check_codes(directory: Path, coded: dict[str, CodedTensor]) -> None:
    """Reading gives the integers that were written, whole and by rows."""
    _, source = opened(directory)
    for name, tensor in coded.items():
        want = tensor.make()
        assert source.stored(name) == (tensor.format, tensor.group)
        assert source.activation_scale(name) == np.float32(tensor.activation_scale or 0)
        for start, stop in ((0, tensor.shape[0]), (tensor.shape[0] // 3, tensor.shape[0] - 1)):
            got = source.read_codes(name, start, stop)
            np.testing.assert_array_equal(got.codes, want.codes[start:stop])
            np.testing.assert_array_equal(got.scales, want.scales[start:stop])
            if want.zeros is not None:
                np.testing.assert_array_equal(got.zeros, want.zeros[start:stop])
        np.testing.assert_array_equal(source.read(name), want.floats())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """[tokens, vocab] of IDS."""
    out: torch.Tensor = model(IDS).logits[0]
    return out


def opened(directory: Path) -> tuple[Graph, Any]:
    """The graph as the checkpoint stores it, and its weights."""
    graph, _, source = load_graph(EngineConfig(model=str(directory)))
    return graph, source


def check_served(directory: Path, formats: set[str]) -> None:
    """The kernels compute with the stored values: what the torch reference gives of them, by the receipt in
    these formats (beside f32)."""
    graph, source = opened(directory)
    assert {w.stored for w in graph.weights.values()} - {"f32"} == formats
    count = IDS.shape[1]
    shape = StepShape(tokens=count, rows=count, spans=1, page_size=32, pages=1, table=1, kv_dtype="f32")
    program = CpuProgram(graph, source, shape, isa=str(_native.best_isa()), threads=1)
    program.ids[:count] = IDS[0]
    program.positions[:count] = program.rows[:count] = range(count)
    program.spans[0] = (0, count, 0, 0, -1)
    program.run(count, 1, count, 1, sample=False)
    ours = torch.from_numpy(program.value("logits", count).copy())
    want = ReferenceModel.load(graph, source).logits(IDS)[0].detach()
    # An activation that lies between two integers may round the other way after sums in another order.
    assert (ours - want).abs().max() <= 0.02 * want.abs().max()
    kernels = {line.kernel for line in program.receipt() if line.calls}
    for format in formats:
        assert f"linear_{format.partition('-')[0]}" in kernels, (format, kernels)
