"""AWQ checkpoints (version "gemm", as AutoAWQ writes them), read.

Layout (https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py): a matrix "x.weight" [n, k]
becomes x.qweight [k, n / 8] int32, integers 0 .. 15 of eight outputs to a word, which holds outputs 0, 2, 4,
6, 1, 3, 5, 7 from its lowest bits up; x.qzeros [groups, n / 8] int32, likewise; x.scales [groups, n] fp16. A
value is scale * (integer - zero).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.codes import Codes
from gossamer.checkpoint.packed import (
    FLOATS,
    ROUNDED,
    Packed,
    PackedCheckpoint,
    Settings,
    TensorFile,
    expect,
    half,
    kernel_format,
    spread,
    unpack,
)
from gossamer.errors import CheckpointError

__all__ = ["open_awq"]

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word outputs 0 to 7 lie."""
_INERT = (
    "quant_method", "group_size", "apply_clip", "backend", "calib_data", "do_fuse", "duo_scaling",
    "exllama_config", "export_compatible", "fuse_max_seq_len", "max_calib_samples", "max_calib_seq_len",
    "modules_to_fuse", "n_parallel_calib_samples", "quantize_config", "split", "text_column",
)  # fmt: skip
_INSTEAD = "convert it with AutoAWQ to version gemm, or take the unquantized model with --quantization"


def open_awq(file: TensorFile, settings: Mapping[str, Any], ignore: Collection[str] = ()) -> PackedCheckpoint:
    """settings: config.json's quantization_config; ignore: as of `Fields`.

    Raises UnsupportedModelError for what no kernel computes, CheckpointError for tensors that are missing or
    of wrong shapes, naming them.
    """
    lowered = {**settings, "version": str(settings.get("version") or "gemm").lower()}
    read = Settings(lowered, ignore)
    read.choice("bits", read.raw("w_bit"), (4,), _INSTEAD)
    read.choice("version", "gemm", ("gemm",), _INSTEAD)
    read.choice(
        "zero_point", True, (True,), "checkpoints without zero points are not of version gemm; " + _INSTEAD
    )
    group = read.raw("group_size") or read.raw("q_group_size") or 128
    if isinstance(group, bool) or not isinstance(group, int) or not (group == -1 or 0 < group < 2**31):
        read.refuse("group_size", group, "a whole number above 0 is right, or -1 for whole rows")
    left = read.names("modules_to_not_convert")
    read.finish(*_INERT)
    matrices = {}
    for name in file.names():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        if any(part in module for part in left):
            raise CheckpointError(
                f"module {module!r} is quantized in the file but listed in "
                "quantization_config.modules_to_not_convert; the checkpoint contradicts itself"
            )
        matrices[f"{module}.weight"] = _matrix(file, module, max(group, 0))
    if not matrices:
        raise CheckpointError(
            "quantization_config says awq, and no tensor's name ends in .qweight; download it again"
        )
    wide = any(file.info(m.parts[2]).dtype != "F16" for m in matrices.values())
    return PackedCheckpoint(file, settings, matrices, notes=[ROUNDED] if wide else [])


def _matrix(file: TensorFile, module: str, group: int) -> Packed:
    name = f"{module}.weight"
    qweight, qzeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    held = file.info(expect(file, qweight, ("I32",), of=name)).shape
    if len(held) != 2 or 0 in held:
        raise CheckpointError(f"tensor {qweight!r} has shape {held}; two axes are right")
    k, n = held[0], held[1] * 8
    groups = -(-k // group) if group else 1
    expect(file, scales, FLOATS, (groups, n), of=name)
    expect(file, qzeros, ("I32",), (groups, held[1]), of=name)
    format, kernel = kernel_format(name, 4, False, group, k)

    def codes(start: int, stop: int) -> Codes:
        low, high = start // 8, -(-stop // 8)
        own = slice(start - 8 * low, stop - 8 * low)
        integers, zeros = (_in_order(file.read(part)[:, low:high])[:, own].T for part in (qweight, qzeros))
        rows = file.read(scales)[:, start:stop].T.astype(np.float32)
        return Codes(
            format=format,
            group=kernel,
            codes=np.ascontiguousarray(integers).view(np.int8),
            scales=half(scales, spread(rows, group, k, kernel)),
            zeros=spread(zeros, group, k, kernel),
        )

    return Packed(shape=(n, k), format=format, group=kernel, parts=(qweight, qzeros, scales), codes=codes)


def _in_order(words: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Integers [rows, 8 w] of words [rows, w]."""
    integers = unpack(words, 4).reshape(words.shape[0], words.shape[1], 8)
    return integers[:, :, _PLACES].reshape(words.shape[0], -1)
