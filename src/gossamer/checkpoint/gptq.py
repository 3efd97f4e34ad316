"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: read, and written.

Layout (https://github.com/ModelCloud/GPTQModel, "Packing Formats and Compatibility"): a matrix "x.weight"
[n, k] becomes x.qweight [k * bits / 32, n] int32, integers 0 .. 2^bits - 1 packed down the inputs, the first
in the lowest bits; x.scales [groups, n] fp16; x.qzeros [groups, n * bits / 32] int32, packed along the
outputs; and x.g_idx [k] int32, the group of every input. A value is scale * (integer - zero). Of
checkpoint_format "gptq" (the first) qzeros hold the zero point - 1, of "gptq_v2" the zero point.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.codes import CodedTensor, Codes
from gossamer.checkpoint.compressed_tensors import checked, must_stay_floats, pack_integers
from gossamer.checkpoint.model_writer import write_config, write_weights
from gossamer.checkpoint.packed import (
    FLOATS,
    ROUNDED,
    Packed,
    PackedCheckpoint,
    Settings,
    TensorFile,
    expect,
    gathered,
    half,
    kernel_format,
    spread,
    unpack,
)
from gossamer.checkpoint.safetensors_writer import LazyTensor
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.graph.families import build_graph
from gossamer.graph.families.names import fit_names
from gossamer.graph.ir import Graph

__all__ = ["open_gptq", "write_gptq"]

Array = npt.NDArray[Any]
_INERT = (
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "damp_auto_increment", "damp_percent", "dataset", "desc_act", "disable_exllama", "exllama_config",
    "hyb_act", "lm_head", "max_input_length", "meta", "mock_quantization", "model_file_base_name",
    "model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize",
    "mse", "offload_to_disk", "offload_to_disk_path", "pack_impl", "pad_token_id", "quant_method",
    "static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama",
)  # fmt: skip


def open_gptq(
    file: TensorFile, settings: Mapping[str, Any], ignore: Collection[str] = ()
) -> PackedCheckpoint:
    """settings: config.json's quantization_config, or quantize_config.json; ignore: as of `Fields`.

    Raises UnsupportedModelError for what no kernel computes, CheckpointError for tensors that are missing or
    of wrong shapes, naming them.
    """
    read = Settings(settings, ignore)
    bits = read.choice(
        "bits", None, (4, 8), "others would have to be quantized anew, from the unquantized model"
    )
    group = read.raw("group_size")
    group = 128 if group is None else group
    if isinstance(group, bool) or not isinstance(group, int) or not (group == -1 or 0 < group < 2**31):
        read.refuse("group_size", group, "a whole number above 0 is right, or -1 for whole rows")
    symmetric = read.flag("sym", True)
    kind = read.choice(
        "checkpoint_format", read.raw("format") or "gptq", ("gptq", "gptq_v2"), "save it as one of these"
    )
    read.choice("pack_dtype", "int32", ("int32",), "save it so")
    if read.flag("is_marlin_format"):
        read.refuse("is_marlin_format", True, "save it in checkpoint_format gptq")
    if read.raw("dynamic"):
        read.refuse("dynamic", read.raw("dynamic"), "modules of several widths are not read; save one width")
    read.finish("format", *_INERT)
    matrices = {}
    for name in file.names():
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            matrices[f"{module}.weight"] = _matrix(
                file, module, bits, max(group, 0), symmetric, kind == "gptq"
            )
    if not matrices:
        raise CheckpointError(
            "quantization_config says gptq, and no tensor's name ends in .qweight; download it again"
        )
    wide = any(m.group and file.info(m.parts[2]).dtype != "F16" for m in matrices.values())
    return PackedCheckpoint(file, settings, matrices, notes=[ROUNDED] if wide else [])


def _matrix(file: TensorFile, module: str, bits: int, group: int, symmetric: bool, first: bool) -> Packed:
    name, per_word = f"{module}.weight", 32 // bits
    qweight, qzeros, scales, g_idx = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    held = file.info(expect(file, qweight, ("I32",), of=name)).shape
    if len(held) != 2 or 0 in held:
        raise CheckpointError(f"tensor {qweight!r} has shape {held}; two axes are right")
    k, n = held[0] * per_word, held[1]
    groups = -(-k // group) if group else 1
    expect(file, scales, FLOATS, (groups, n), of=name)
    expect(file, qzeros, ("I32",), (groups, -(-n // per_word)), of=name)
    if g_idx in file:
        expect(file, g_idx, ("I32", "I64"), (k,), of=name)
    order = gathered(file, g_idx, group or k, groups) if g_idx in file else None

    def zeros() -> npt.NDArray[np.int16]:
        return unpack(file.read(qzeros), bits)[:, :n].T.astype(np.int16) + np.int16(first)

    centre = 1 << (bits - 1)
    even, highest = bool((zeros() == centre).all()), int(zeros().max())
    if symmetric and not even:
        raise CheckpointError(
            f"tensor {qzeros!r} has other zero points than {centre}, but the config says sym; if it "
            f"holds them as the other checkpoint_format does, correct that"
        )
    format, kernel = kernel_format(name, bits, even, group, k)
    if format == "uint4" and highest > 15:
        # A zero point of 0 became -1, which 4 bits hold as 15: AutoGPTQ and its kernels take it for 16.
        raise UnsupportedModelError(
            f"tensor {qzeros!r} has a zero point of 16, which no kernel holds; save it as gptq_v2"
        )

    def codes(start: int, stop: int) -> Codes:
        packed = np.ascontiguousarray(file.read(qweight)[:, start:stop].T)
        integers = unpack(packed, bits)
        if order is not None:
            integers = np.ascontiguousarray(integers[:, order])
        own = integers if format == "uint4" else (integers.astype(np.int16) - centre).astype(np.int8)
        rows = spread(file.read(scales)[:, start:stop].T.astype(np.float32), group, k, kernel)
        zero = spread(zeros()[start:stop].astype(np.uint8), group, k, kernel) if format == "uint4" else None
        return Codes(
            format=format,
            group=kernel,
            codes=own.view(np.int8),
            scales=half(scales, rows) if kernel else np.ascontiguousarray(rows),
            zeros=zero,
        )

    parts = (qweight, qzeros, scales, *([g_idx] if g_idx in file else []))
    given = None if order is None else tuple(order.tolist())
    return Packed(shape=(n, k), format=format, group=kernel, parts=parts, codes=codes, order=given)


def write_gptq(
    directory: Path,
    config: Mapping[str, Any],
    floats: Mapping[str, Array | LazyTensor],
    coded: Mapping[str, CodedTensor],
    *,
    graph: Graph | None = None,
    shard: int = 4 << 30,
) -> int:
    """Weights and config.json in checkpoint_format gptq; gives the bytes of all tensors.

    All of `coded` must be int4, or all uint4, in one group. config, graph: as of `write_compressed_tensors`.
    Raises CheckpointError for what the format cannot hold: embeddings and heads among it; OSError.
    """
    kinds = {(t.format, t.group) for t in coded.values()}
    if len(kinds) != 1 or next(iter(kinds))[0] not in ("int4", "uint4"):
        raise CheckpointError(f"GPTQ holds int4 or uint4 of one group throughout; given are {sorted(kinds)}")
    ((format, group),) = kinds
    graph = fit_names(build_graph(config) if graph is None else graph, {*floats, *coded})
    refused = must_stay_floats(graph)
    tensors: dict[str, Array | LazyTensor] = dict(floats)
    for name, tensor in coded.items():
        why = refused.get(name) or ("it lies outside of the layers" if ".layers." not in name else "")
        n, k = tensor.shape
        if not why and (n % 8 or k % group):
            why = f"{tensor.shape} is no multiple of 8 by its group, {group}"
        if why or not name.endswith(".weight"):
            raise CheckpointError(f"tensor {name!r} must stay floats in GPTQ: {why or 'it is no weight'}")
        tensors |= _stored(name, tensor)
    total = write_weights(directory, tensors, shard=shard)
    quantization = {
        "quant_method": "gptq", "bits": 4, "group_size": group, "sym": format == "int4", "desc_act": False,
        "checkpoint_format": "gptq", "lm_head": False, "pack_dtype": "int32", "static_groups": False,
        "true_sequential": True,
    }  # fmt: skip
    write_config(directory, {**config, "quantization_config": quantization})
    return total


def _stored(name: str, tensor: CodedTensor) -> dict[str, Array | LazyTensor]:
    (n, k), group, module = tensor.shape, tensor.group, name.removesuffix(".weight")
    make = checked(name, tensor)
    lift = 8 if tensor.format == "int4" else 0

    def qweight() -> Array:
        integers = (make().codes + np.int8(lift)).view(np.uint8)
        return np.ascontiguousarray(pack_integers(integers, 4).T)

    def qzeros() -> Array:
        zeros = make().zeros if lift == 0 else np.full((n, k // group), 8, np.uint8)
        if zeros is None or zeros.min(initial=1) < 1:
            raise CheckpointError(
                f"tensor {name!r} has a zero point of 0, which GPTQ's first format cannot hold"
            )
        return pack_integers(np.ascontiguousarray(zeros.T - np.uint8(1)), 4)

    return {
        f"{module}.qweight": LazyTensor("I32", (k // 8, n), qweight),
        f"{module}.qzeros": LazyTensor("I32", (k // group, n // 8), qzeros),
        f"{module}.scales": LazyTensor(
            "F16", (k // group, n), lambda: np.ascontiguousarray(make().scales.T.astype(np.float16))
        ),
        f"{module}.g_idx": (np.arange(k) // group).astype(np.int32),
    }
