"""Writing compressed-tensors: quantized matrices on safetensors, as transformers and vLLM load them.

Layout (https://github.com/vllm-project/compressed-tensors, release 0.20): a matrix "x.weight" [n, k] becomes
  pack-quantized  x.weight_packed [n, ceil(k * bits / 32)] int32, code i of a row, unsigned (its least is 0),
                  at bit i * bits; x.weight_scale [n, groups]; x.weight_shape [2] int64; where there are zero
                  points, x.weight_zero_point [ceil(n * bits / 32), groups] int32, packed down the rows
  int-quantized   x.weight [n, k] int8, x.weight_scale [n, 1], of static activations x.input_scale [1]
and config.json's quantization_config says which modules are stored how.

What the public loader (transformers 4.57 with compressed-tensors 0.20) makes of it: linear layers and
embeddings load, a head that is tied to its embedding does not, nor does GPT-2's Conv1D (`must_stay_floats`).
Activations are never quantized before an embedding, so its int8 rows are packed too. Zero points load through
the library's own decompressor; through transformers 4.57 they do not, not even those that the library wrote,
as it makes room for unpacked ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.codes import CodedTensor, Codes
from gossamer.checkpoint.model_writer import write_config, write_weights
from gossamer.checkpoint.safetensors_writer import LazyTensor
from gossamer.errors import CheckpointError
from gossamer.graph.families import build_graph
from gossamer.graph.families.names import fit_names
from gossamer.graph.ir import Graph
from gossamer.graph.weights import Concat, Slice, Stack, Tensor, WeightExpr, leaves

__all__ = ["checked", "must_stay_floats", "pack_integers", "write_compressed_tensors"]

Array = npt.NDArray[Any]
PACKED, INT, MIXED = "pack-quantized", "int-quantized", "mixed-precision"


class _Scheme(NamedTuple):
    """What a config group says of its matrices."""

    format: str
    group: int
    activations: str
    """"dynamic" or "static": int8 of their own scale per token, or of one scale; "float" stay as they are."""

    @property
    def layout(self) -> str:
        return PACKED if self.activations == "float" else INT

    @property
    def bits(self) -> int:
        return 8 if self.format == "int8" else 4

    def config(self, targets: list[str]) -> dict[str, Any]:
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.format != "uint4",
            "strategy": "group" if self.group else "channel",
            "dynamic": False,
        }
        if self.group:
            weights["group_size"] = self.group
        inputs = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "tensor" if self.activations == "static" else "token",
            "dynamic": self.activations == "dynamic",
        }
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": None if self.activations == "float" else inputs,
            "output_activations": None,
            "format": self.layout,
        }


def write_compressed_tensors(
    directory: Path,
    config: Mapping[str, Any],
    floats: Mapping[str, Array | LazyTensor],
    coded: Mapping[str, CodedTensor],
    *,
    graph: Graph | None = None,
    shard: int = 4 << 30,
) -> int:
    """Weights and config.json; gives the bytes of all tensors. Both mappings go by tensor name.

    config: the model's config.json, to which quantization_config is added; graph: what it describes, where
    that is at hand. int4 and uint4 with groups of 32, 64 or 128 and int8 with groups become pack-quantized;
    int8 with a scale per row int-quantized, with int8 activations: a scale per token, or that of the tensor.
    Scales of groups are written as fp16, of rows as float32. Raises CheckpointError for a tensor that the
    format or its loaders cannot hold; OSError.
    """
    tensors: dict[str, Array | LazyTensor] = dict(floats)
    targets: dict[_Scheme, list[str]] = {}
    graph = fit_names(build_graph(config) if graph is None else graph, {*floats, *coded})
    refused, embedded = must_stay_floats(graph), _embedded(graph)
    for name, tensor in coded.items():
        _check(name, tensor, floats)
        if name in refused:
            raise CheckpointError(f"tensor {name!r} must stay floats in compressed-tensors: {refused[name]}")
        if name in embedded and tensor.activation_scale is not None:
            raise CheckpointError(f"tensor {name!r} is looked up, not multiplied: it has no activation_scale")
        module = name.removesuffix(".weight")
        inputs = "dynamic" if tensor.activation_scale is None else "static"
        plain = tensor.group or name in embedded
        scheme = _Scheme(tensor.format, tensor.group, "float" if plain else inputs)
        tensors |= _stored(module, tensor, scheme)
        targets.setdefault(scheme, []).append(module)
    layouts = {scheme.layout for scheme in targets}
    groups = {f"group_{i}": scheme.config(sorted(names)) for i, (scheme, names) in enumerate(targets.items())}
    quantization = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layouts.pop() if len(layouts) == 1 else MIXED,
        "config_groups": groups,
        "ignore": _left(floats),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    total = write_weights(directory, tensors, shard=shard)
    write_config(directory, {**config, "quantization_config": quantization} if coded else config)
    return total


def must_stay_floats(graph: Graph) -> dict[str, str]:
    """Tensors of matrices that loaders of compressed-tensors do not take quantized, and why.

    graph: as its family builds it, under the checkpoint's names.
    """
    found: dict[str, str] = {}
    readers: dict[str, list[str]] = {}
    for node in graph.nodes:
        for name in node.weights:
            readers.setdefault(name, []).append(node.op)
    routers = {n.inputs[0] for n in graph.nodes if n.op == "top_k_experts"}
    routing = {n.weights[0] for n in graph.nodes if n.op == "linear" and n.outputs[0] in routers}
    for name, ops in readers.items():
        weight = graph.weights[name]
        why = ""
        if name in routing:
            why = "it is a router: tiny, and it decides which expert runs"
        elif "embed" in ops and len(ops) > 1:
            why = "the head is tied to the embedding, and loaders find no weight to tie"
        elif len(weight.shape) > 1 and not _plain(weight.expr):
            why = "it is stored transposed (Conv1D), and loaders quantize linear layers alone"
        if why:
            found |= dict.fromkeys((leaf.name for leaf in leaves(weight.expr)), why)
    return found


def pack_integers(integers: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Rows [n, k] of unsigned integers as int32 words [n, ceil(k * bits / 32)], the first in the lowest bits.
    bits: 4 or 8."""
    per_word = 32 // bits
    padded = np.pad(integers, ((0, 0), (0, -integers.shape[1] % per_word)))
    octets = padded if bits == 8 else np.bitwise_or(padded[:, 0::2], padded[:, 1::2] << 4)
    return np.ascontiguousarray(octets).view("<i4").astype(np.int32, copy=False)


def _plain(expr: WeightExpr) -> bool:
    """Rows of tensors as they lie in the file."""
    if isinstance(expr, Concat | Stack):
        return all(_plain(source) for source in expr.sources)
    return isinstance(expr, Tensor) or (isinstance(expr, Slice) and expr.axis == 0 and _plain(expr.source))


def _embedded(graph: Graph) -> set[str]:
    weights = [graph.weights[name] for node in graph.nodes if node.op == "embed" for name in node.weights]
    return {leaf.name for weight in weights for leaf in leaves(weight.expr)}


def _stored(module: str, tensor: CodedTensor, scheme: _Scheme) -> dict[str, Array | LazyTensor]:
    n, k = tensor.shape
    make = checked(f"{module}.weight", tensor)
    scales: dict[str, Array] = {}

    def codes() -> Codes:
        # Scales and zero points are kept: they are small, and making codes may cost.
        made = make()
        scales["scales"] = made.scales
        if made.zeros is not None:
            scales["zeros"] = made.zeros
        return made

    def small(key: str) -> Array:
        if key not in scales:
            codes()
        return scales[key]

    if scheme.layout == INT:
        out: dict[str, Array | LazyTensor] = {
            f"{module}.weight": LazyTensor("I8", (n, k), lambda: codes().codes),
            f"{module}.weight_scale": LazyTensor("F32", (n, 1), lambda: small("scales")),
        }
        if tensor.activation_scale is not None:
            out[f"{module}.input_scale"] = np.asarray([tensor.activation_scale], np.float32)
        return out
    bits, groups = scheme.bits, k // scheme.group if scheme.group else 1
    least = 0 if scheme.format == "uint4" else -(1 << (bits - 1))

    def packed() -> Array:
        return pack_integers((codes().codes.astype(np.int16) - least).astype(np.uint8), bits)

    out = {
        f"{module}.weight_shape": np.asarray([n, k], np.int64),
        f"{module}.weight_packed": LazyTensor("I32", (n, -(-k * bits // 32)), packed),
        f"{module}.weight_scale": LazyTensor(
            "F16" if scheme.group else "F32",
            (n, groups),
            lambda: small("scales").astype(np.float16 if scheme.group else np.float32),
        ),
    }
    if scheme.format == "uint4":
        out[f"{module}.weight_zero_point"] = LazyTensor(
            "I32",
            (-(-n * bits // 32), groups),
            lambda: np.ascontiguousarray(pack_integers(np.ascontiguousarray(small("zeros").T), bits).T),
        )
    return out


def checked(name: str, tensor: CodedTensor) -> Callable[[], Codes]:
    def make() -> Codes:
        codes = tensor.make()
        if (codes.format, codes.group, codes.codes.shape) != (tensor.format, tensor.group, tensor.shape):
            raise CheckpointError(
                f"tensor {name!r} was announced as {tensor.format} group {tensor.group} {tensor.shape} but "
                f"came as {codes.format} group {codes.group} {codes.codes.shape}"
            )
        if not np.isfinite(codes.scales).all():
            raise CheckpointError(f"tensor {name!r}: a scale is NaN or infinite; its weights were")
        if codes.group and not np.array_equal(codes.scales, codes.scales.astype(np.float16)):
            raise CheckpointError(f"tensor {name!r}: its scales are not exact in fp16; round them first")
        return codes

    return make


def _check(name: str, tensor: CodedTensor, floats: Mapping[str, Any]) -> None:
    if not name.endswith(".weight"):
        raise CheckpointError(
            f"tensor {name!r} is no module's weight, so it has no quantized form; keep floats"
        )
    if name in floats:
        raise CheckpointError(f"tensor {name!r} is given both as floats and as codes")
    if tensor.format not in ("int8", "int4", "uint4") or (tensor.format != "int8" and not tensor.group):
        raise CheckpointError(
            f"tensor {name!r}: compressed-tensors has no {tensor.format} with groups of {tensor.group}; "
            "write int8, int4 or uint4"
        )
    if tensor.group and tensor.shape[1] % tensor.group:
        raise CheckpointError(
            f"tensor {name!r} has {tensor.shape[1]} inputs, which groups of {tensor.group} do not divide, as "
            "compressed-tensors needs; choose a smaller group or int8"
        )
    if tensor.activation_scale is not None and (tensor.group or tensor.format != "int8"):
        raise CheckpointError(f"tensor {name!r}: static activations go with int8 of one scale per row alone")


def _left(floats: Mapping[str, Array | LazyTensor]) -> list[str]:
    """Modules that stay floats, for readers whose targets are classes of modules."""
    matrices = [name for name, tensor in floats.items() if len(tensor.shape) == 2]
    return sorted(name.removesuffix(".weight") for name in matrices if name.endswith(".weight"))
