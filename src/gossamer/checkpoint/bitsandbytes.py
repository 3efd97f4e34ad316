"""bitsandbytes checkpoints, read: NF4 and int8.

Layout (https://github.com/bitsandbytes-foundation/bitsandbytes, functional.py: QuantState.as_dict): of NF4 a
matrix "x.weight" [n, k] is itself [ceil(n k / 2), 1] bytes, the first of two numbers in the upper bits;
x.weight.absmax [blocks], the largest of every block of consecutive numbers, float32, or where quantized
itself 8 bits into x.weight.nested_quant_map [256] times x.weight.nested_absmax [blocks /
nested_blocksize], plus nested_offset; x.weight.quant_map [16] the levels; and
x.weight.quant_state.bitsandbytes__nf4 a JSON text with shape and sizes. Of int8 it is itself [n, k] int8, and
x.SCB [n] float32 what 127 stands for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.codes import Codes
from gossamer.checkpoint.json_file import parse_json_object
from gossamer.checkpoint.packed import Packed, PackedCheckpoint, Settings, TensorFile, expect, half
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.graph.ops.formats import NF4

__all__ = ["open_bitsandbytes"]

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_INERT = (
    "quant_method", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage",
    "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
)  # fmt: skip
_INSTEAD = "nf4 and int8 can be read, or the unquantized model with --quantization"
_LOSS = (
    "levels of nf4 are kept as 127ths of the largest weight, at most 0.0037 of it off, and its scale as fp16;"
    " which level a weight has stays as it is"
)
_OUTLIERS = (
    "all inputs are rounded to int8, a scale per token; bitsandbytes keeps those above llm_int8_threshold "
    "as floats"
)


def open_bitsandbytes(
    file: TensorFile, settings: Mapping[str, Any], ignore: Collection[str] = ()
) -> PackedCheckpoint:
    """settings: config.json's quantization_config; ignore: as of `Fields`.

    Raises UnsupportedModelError for what no kernel computes, CheckpointError for tensors that are missing or
    of wrong shapes, naming them.
    """
    read = Settings(settings, ignore)
    four, eight = read.flag("load_in_4bit"), read.flag("load_in_8bit")
    if four == eight:
        read.refuse("load_in_4bit", four, f"exactly one of it and load_in_8bit is true; {_INSTEAD}")
    kind = read.raw("bnb_4bit_quant_type")
    if four:
        read.choice("bnb_4bit_quant_type", "fp4", ("nf4",), _INSTEAD)
    threshold = read.raw("llm_int8_threshold")
    read.finish(*_INERT, *([] if four or kind is None else ["bnb_4bit_quant_type"]))
    end = f"{_STATE}nf4" if four else ".SCB"
    found = [name.removesuffix(end) for name in file.names() if name.endswith(end)]
    if not found:
        raise CheckpointError(
            f"quantization_config says bitsandbytes, and no tensor's name ends in {end}; download it again"
        )
    if four:
        matrices = {name: _nf4(file, name, name + end) for name in found}
        return PackedCheckpoint(file, settings, matrices, notes=[_LOSS])
    matrices = {f"{module}.weight": _int8(file, module) for module in found}
    formats = [f"{module}.weight_format" for module in found]
    return PackedCheckpoint(file, settings, matrices, aside=formats, notes=[_OUTLIERS] if threshold else [])


def _int8(file: TensorFile, module: str) -> Packed:
    name, scb = f"{module}.weight", f"{module}.SCB"
    shape = file.info(expect(file, name, ("I8",), of=scb)).shape
    if len(shape) != 2:
        raise CheckpointError(f"tensor {name!r} has shape {shape}; two axes are right")
    n, k = shape
    expect(file, scb, ("F32",), (n,), of=name)
    packing = f"{module}.weight_format"
    if packing in file and file.read(packing).any():
        raise UnsupportedModelError(
            f"tensor {packing!r}: weights tiled for a GPU are not read; save them as rows"
        )

    def codes(start: int, stop: int) -> Codes:
        scales = np.asarray(file.read_rows(scb, start, stop), np.float32).reshape(-1, 1) / np.float32(127)
        return Codes(format="int8", group=0, codes=file.read_rows(name, start, stop), scales=scales)

    return Packed(shape=(n, k), format="int8", group=0, parts=(name, scb), codes=codes)


def _nf4(file: TensorFile, name: str, state_name: str) -> Packed:
    state = parse_json_object(
        file.read(state_name).tobytes().decode("utf-8", "replace"), f"tensor {state_name!r}"
    )
    shape, block = state.get("shape"), state.get("blocksize")
    sizes = [*(shape if isinstance(shape, list) else []), block]
    if len(sizes) != 3 or not all(isinstance(s, int) and 0 < s < 2**31 for s in sizes):
        raise CheckpointError(
            f"tensor {state_name!r} says shape {shape!r}, blocksize {block!r}; [n, k] and a number are right"
        )
    n, k, block = sizes
    if name not in file or file.info(name).nbytes != -(-n * k // 2):
        raise CheckpointError(
            f"tensor {name!r} must have {-(-n * k // 2)} bytes for its shape {shape}; download it again"
        )
    group = next((g for g in (128, 64, 32) if block % g == 0), 0)
    if not group or (k % block and n > 1):
        raise UnsupportedModelError(
            f"tensor {name!r} has rows of {k} and blocks of {block}, which do not end where rows do or are "
            "no multiple of 32: no kernel holds them; take the unquantized model with --quantization nf4"
        )
    blocks = -(-n * k // block)
    absmax = f"{name}.absmax"
    nested = f"{name}.nested_absmax" in file
    parts = [f"{name}.{part}" for part in _PARTS[: 4 if nested else 2]]
    expect(file, absmax, ("U8" if nested else "F32",), (blocks,), of=name)
    levels = file.read(expect(file, f"{name}.quant_map", ("F32",), (16,), of=name))
    if not np.abs(levels - np.asarray(NF4, np.float32) / 127).max() < 0.004:
        raise CheckpointError(f"tensor {name + '.quant_map'!r} does not hold the levels of NF4")
    inner, offset = state.get("nested_blocksize", 1), state.get("nested_offset", 0.0)
    if not (isinstance(inner, int) and inner > 0 and isinstance(offset, int | float)):
        raise CheckpointError(
            f"tensor {state_name!r} says nested_blocksize {inner!r}, nested_offset {offset!r}; "
            "numbers are right: download it again"
        )
    if nested:
        expect(file, f"{name}.nested_absmax", ("F32",), (-(-blocks // inner),), of=name)
        expect(file, f"{name}.nested_quant_map", ("F32",), (256,), of=name)
    per_row = -(-k // block)

    def largest(first: int, last: int) -> npt.NDArray[np.float32]:
        """absmax of blocks [first, last)."""
        values = file.read(absmax)[first:last]
        if not nested:
            return np.asarray(values, np.float32)
        outer = file.read(f"{name}.nested_absmax")[np.arange(first, last) // inner]
        return np.asarray(
            file.read(f"{name}.nested_quant_map")[values] * outer + np.float32(offset), np.float32
        )

    def codes(start: int, stop: int) -> Codes:
        low, high = start * k // 2, -(-stop * k // 2)
        octets = file.read(name).reshape(-1).view(np.uint8)[low:high]
        integers = np.stack([octets >> 4, octets & 15], 1).reshape(-1)[start * k - 2 * low :][
            : (stop - start) * k
        ]
        scales = largest(start * per_row, stop * per_row).reshape(-1, per_row) / np.float32(127)
        spread = scales[:, np.arange(0, k, group) // block]
        return Codes(
            format="nf4",
            group=group,
            codes=integers.reshape(-1, k).view(np.int8),
            scales=half(absmax, spread),
        )

    return Packed(shape=(n, k), format="nf4", group=group, parts=(name, *parts, state_name), codes=codes)
