"""Reading compressed-tensors. `compressed_tensors.py` has the layout, `bitmask.py` that of sparse tensors.

A module's scheme is that of the first target that names it: its own name, a pattern ("re:..."), or its class,
of which "Linear" is every matrix and "Embedding" every lookup, as only modules with scales are asked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.bitmask import open_bitmask
from gossamer.checkpoint.codes import Codes
from gossamer.checkpoint.compressed_tensors import INT, MIXED, PACKED
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
from gossamer.checkpoint.safetensors import DTYPES
from gossamer.errors import CheckpointError, UnsupportedModelError

__all__ = ["open_compressed_tensors"]

_LAYOUTS = (PACKED, INT, "naive-quantized")
_INSTEAD = (
    "int4 (pack-quantized) and int8 (int-quantized) checkpoints would work, or the unquantized model with "
    "--quantization"
)
_PARTS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", "input_scale")
_LEFT_OUT = ("observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype", "block_structure")


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How a group's weights are stored; group 0: a scale per row; static: a scale of the inputs is stored."""

    bits: int
    symmetric: bool
    group: int
    whole: bool
    static: bool


def open_compressed_tensors(
    file: TensorFile, settings: Mapping[str, Any], ignore: Collection[str] = ()
) -> PackedCheckpoint:
    """settings: config.json's quantization_config; ignore: as of `Fields`.

    Raises UnsupportedModelError for what no kernel computes, CheckpointError for tensors that are missing or
    of wrong shapes, naming them.
    """
    read = Settings(settings, ignore)
    sparsity = read.raw("sparsity_config") or {}
    if not isinstance(sparsity, dict):
        read.refuse("sparsity_config", sparsity, "an object is right")
    if sparsity:
        file = open_bitmask(file, sparsity, read)
    groups = read.raw("config_groups") or {}
    layouts = (*_LAYOUTS, MIXED, "dense", "fakequant") if groups else (None, "dense", *_LAYOUTS, MIXED)
    layout = read.choice("format", "dense", layouts, _INSTEAD)
    if not isinstance(groups, dict):
        read.refuse("config_groups", groups, "an object of groups is right")
    status = read.choice(
        "quantization_status", "compressed", ("compressed", "frozen", "initialized"), _INSTEAD
    )
    if groups and status != "compressed":
        read.refuse("quantization_status", status, "only a compressed checkpoint holds integers; compress it")
    if read.raw("kv_cache_scheme"):
        read.refuse(
            "kv_cache_scheme",
            read.raw("kv_cache_scheme"),
            "scales of stored keys and values are not read; "
            "--kv-cache-dtype int8 computes them, and --ignore-config-field "
            "quantization_config.kv_cache_scheme goes on without",
        )
    if read.raw("transform_config"):
        read.refuse(
            "transform_config", read.raw("transform_config"), "rotations are not applied; " + _INSTEAD
        )
    left = read.names("ignore")
    read.finish(
        "quant_method", "version", "global_compression_ratio", "run_compressed", "moe_sparsity_config"
    )
    schemes: dict[str, _Scheme] = {}
    for name, group in groups.items():
        scheme, targets = _scheme(name, group, layout)
        schemes |= {target: scheme for target in targets if target not in schemes}
    matrices: dict[str, Packed] = {}
    notes: list[str] = []
    for module in _modules(file):
        if _matches(module, left):
            raise CheckpointError(
                f"module {module!r} is quantized in the file but listed in quantization_config.ignore; the "
                "checkpoint contradicts itself: download or convert it again"
            )
        scheme_of = next((schemes[t] for t in _by_precision(schemes) if _matches(module, [t])), None)
        if scheme_of is None:
            raise CheckpointError(
                f"module {module!r} is quantized in the file, and no group of quantization_config names it"
            )
        matrices[f"{module}.weight"] = _matrix(file, module, scheme_of, notes)
    for target in schemes:
        if f"{target}.weight" in file and f"{target}.weight" not in matrices:
            raise CheckpointError(f"module {target!r} has no {target + '.weight_scale'!r}; download it again")
    return PackedCheckpoint(file, settings, matrices, notes=notes)


def _scheme(name: str, group: Any, layout: Any) -> tuple[_Scheme, list[str]]:
    where = f"config_groups.{name}"
    if not isinstance(group, dict):
        raise UnsupportedModelError(
            f"config.json: quantization_config.{where} is {group!r}; an object is right"
        )
    read = Settings({f"{where}.{key}": value for key, value in group.items()})
    targets = read.names(f"{where}.targets")
    own = read.choice(
        f"{where}.format", layout, _LAYOUTS if layout != "dense" else (*_LAYOUTS, "dense"), _INSTEAD
    )
    weights, inputs = read.raw(f"{where}.weights"), read.raw(f"{where}.input_activations")
    if read.raw(f"{where}.output_activations"):
        read.refuse(
            f"{where}.output_activations", group["output_activations"], "outputs stay floats; " + _INSTEAD
        )
    read.finish()
    if not isinstance(weights, dict):
        read.refuse(f"{where}.weights", weights, "weights must be quantized; " + _INSTEAD)
    bits, symmetric, strategy, size, dynamic = _args(f"{where}.weights", weights)
    if dynamic or bits not in (4, 8) or strategy not in ("group", "channel", "tensor"):
        read.refuse(
            f"{where}.weights", weights, "4 or 8 bits by group, channel or tensor can be read; " + _INSTEAD
        )
    static = False
    if inputs:
        if not isinstance(inputs, dict):
            read.refuse(f"{where}.input_activations", inputs, "an object is right; " + _INSTEAD)
        of = _args(f"{where}.input_activations", inputs)
        static = not of[4]
        if of[0] != 8 or not of[1] or (static and (of[2] != "tensor" or strategy == "group" or bits != 8)):
            read.refuse(
                f"{where}.input_activations",
                inputs,
                "symmetric int8, a scale per token (dynamic) or one for all "
                "beside int8 weights without groups (static), is what kernels compute; " + _INSTEAD,
            )
    return _Scheme(bits, symmetric, size if strategy == "group" else 0, own != PACKED, static), targets


def _args(where: str, args: Mapping[str, Any]) -> tuple[int, bool, str, int, bool]:
    """(bits, symmetric, strategy, group size, dynamic) of compressed-tensors' QuantizationArgs."""
    read = Settings({f"{where}.{key}": value for key, value in args.items()})
    read.choice(f"{where}.type", "int", ("int",), _INSTEAD)
    bits = read.whole(f"{where}.num_bits", 8, least=1)
    symmetric = read.flag(f"{where}.symmetric", True)
    size = read.raw(f"{where}.group_size")
    if size is not None and (
        isinstance(size, bool) or not isinstance(size, int) or not -1 <= size < 2**31 or not size
    ):
        read.refuse(f"{where}.group_size", size, "a whole number above 0 is right, or -1 for whole rows")
    by_size = "tensor" if size is None else "channel" if size < 0 else "group"
    strategy = read.choice(
        f"{where}.strategy",
        by_size,
        ("group", "channel", "tensor", "token"),
        "blocks and heads cannot; " + _INSTEAD,
    )
    if strategy == "group" and (size is None or size < 1):
        read.refuse(f"{where}.group_size", size, "strategy group needs a whole number above 0")
    dynamic = read.choice(f"{where}.dynamic", False, (True, False), _INSTEAD)
    if str(args.get("actorder")).lower() in ("group", "dynamic"):
        read.refuse(
            f"{where}.actorder",
            args["actorder"],
            "groups that follow the activations' order scatter over the inputs, "
            "which no kernel reads; quantize with actorder weight or without",
        )
    read.finish(*(f"{where}.{name}" for name in _LEFT_OUT))
    return bits, symmetric, strategy, size or 0, dynamic


def _modules(file: TensorFile) -> list[str]:
    """Modules with quantized weights."""
    found: dict[str, None] = {}
    for name in file.names():
        module, _, part = name.rpartition(".")
        if part in ("weight_packed", "weight_scale") or (
            part == "weight" and file.info(name).dtype in ("I8", "I32", "F8_E4M3", "F8_E5M2", "U8")
        ):
            found[module] = None
    return list(found)


def _by_precision(targets: Collection[str]) -> list[str]:
    """Names before patterns before classes, as the library takes them."""
    return sorted(targets, key=lambda t: (t in ("Linear", "Embedding"), t.startswith("re:"), t))


def _matches(module: str, targets: Collection[str]) -> bool:
    def match(target: str) -> bool:
        if target.startswith("re:"):
            try:
                return re.match(target[3:], module) is not None
            except re.error as error:
                raise UnsupportedModelError(
                    f"config.json: quantization_config names modules by {target!r}, no pattern: {error}"
                ) from None
        if target == "Embedding":
            return module.rsplit(".", 1)[-1] in ("embed_tokens", "wte")
        return target in (module, "Linear")

    return any(match(target) for target in targets)


def _matrix(file: TensorFile, module: str, scheme: _Scheme, notes: list[str]) -> Packed:
    name = f"{module}.weight"

    def need(part: str) -> str:
        return expect(file, f"{module}.{part}", DTYPES, of=name)

    codes_name = need("weight" if scheme.whole else "weight_packed")
    scale_name = need("weight_scale")
    held = file.info(expect(file, codes_name, ("I8" if scheme.whole else "I32",), of=name)).shape
    if len(held) != 2:
        raise CheckpointError(f"tensor {codes_name!r} has shape {held}; two axes are right")
    n, k = held if scheme.whole else _shape(file, need("weight_shape"), held, scheme.bits)
    groups = -(-k // scheme.group) if scheme.group else 1
    g_idx = f"{module}.weight_g_idx"
    order = None
    if g_idx in file:
        order = gathered(file, expect(file, g_idx, ("I32", "I64"), (k,), of=name), scheme.group or k, groups)
    one = groups == 1 and file.info(scale_name).shape in ((), (1,), (1, 1))
    if not one:
        expect(file, scale_name, FLOATS, (n, groups), *([(n,)] if groups == 1 else []), of=name)
    zero_name = None if scheme.symmetric else need("weight_zero_point")
    format, group = kernel_format(name, scheme.bits, scheme.symmetric, scheme.group, k)
    if group and file.info(scale_name).dtype != "F16":
        notes.append(ROUNDED)
    scale = 0.0
    if scheme.static:
        if f"{module}.input_zero_point" in file and file.read(f"{module}.input_zero_point").any():
            raise UnsupportedModelError(
                f"tensor {module + '.input_zero_point'!r} is not 0: inputs with zero points "
                "have no kernel; " + _INSTEAD
            )
        values = np.asarray(file.read(need("input_scale")), np.float32).reshape(-1)
        if values.size != 1 or not 0 < values[0] < np.inf:
            raise CheckpointError(
                f"tensor {module + '.input_scale'!r} holds {values[:3]}; one number above 0 is right"
            )
        scale = float(values[0])

    def codes(start: int, stop: int) -> Codes:
        if scheme.whole:
            integers = np.asarray(file.read_rows(codes_name, start, stop))
            if scheme.bits == 4 and integers.size and not -8 <= integers.min() <= integers.max() <= 7:
                raise CheckpointError(
                    f"tensor {codes_name!r} holds integers beyond 4 bits; download it again"
                )
        else:
            unsigned = unpack(file.read_rows(codes_name, start, stop), scheme.bits)[:, :k]
            integers = (unsigned.astype(np.int16) - (1 << (scheme.bits - 1))).astype(np.int8)
        if order is not None:
            integers = np.ascontiguousarray(integers[:, order])
        rows = file.read(scale_name).reshape(-1, groups)
        scales = np.broadcast_to(rows, (n, groups))[start:stop] if one else rows[start:stop]
        scales = spread(np.asarray(scales, np.float32), scheme.group, k, group)
        zeros = None
        if zero_name is not None:
            zeros = spread(_zeros(file, zero_name, scheme, n, groups)[start:stop], scheme.group, k, group)
            integers = integers + np.int8(8)
        scales = half(scale_name, scales) if group else np.ascontiguousarray(scales)
        return Codes(format=format, group=group, codes=integers, scales=scales, zeros=zeros)

    parts = tuple(f"{module}.{part}" for part in _PARTS if f"{module}.{part}" in file)
    more = tuple(f"{module}.{p}" for p in ("input_zero_point", "output_scale") if f"{module}.{p}" in file)
    rest = tuple(part for part in parts if part != codes_name)
    return Packed(
        shape=(n, k),
        format=format,
        group=group,
        parts=(codes_name, *rest, *more),
        codes=codes,
        activation_scale=scale,
        order=None if order is None else tuple(order.tolist()),
    )


def _shape(file: TensorFile, name: str, packed: tuple[int, ...], bits: int) -> tuple[int, int]:
    values = file.read(name)
    shape = tuple(int(v) for v in np.asarray(values).reshape(-1)[:3])
    if len(shape) != 2 or shape[0] != packed[0] or shape[1] < 1 or -(-shape[1] * bits // 32) != packed[1]:
        raise CheckpointError(
            f"tensor {name!r} says {shape}, but the packed integers are {packed} words of 32 bits"
        )
    return shape[0], shape[1]


def _zeros(file: TensorFile, name: str, scheme: _Scheme, n: int, groups: int) -> npt.NDArray[np.uint8]:
    """Zero points [n, groups], 0 .. 15."""
    words = file.read(name)
    if scheme.whole and words.shape == (n, groups):
        if words.dtype.kind not in "iu" or not -8 <= words.min() <= words.max() <= 7:
            raise CheckpointError(f"tensor {name!r} holds more than integers of 4 bits; download it again")
        return (np.asarray(words, np.int16) + 8).astype(np.uint8)
    if words.dtype != np.int32 or words.shape != (-(-n * 4 // 32), groups):
        raise CheckpointError(
            f"tensor {name!r} is {words.dtype} {words.shape}; int32 {(-(-n * 4 // 32), groups)} is right"
        )
    return unpack(np.ascontiguousarray(words.T), 4)[:, :n].T
