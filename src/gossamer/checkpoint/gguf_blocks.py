"""The block types of GGUF: their bytes as floats, as our integers, and floats as their bytes.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. In all of them the codes of a run of
32 lie half by half: byte i holds those of i and i + 16 (or, with 256 in a block, of i and i + 32).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.codes import Codes

__all__ = [
    "BLOCKS",
    "BY_NAME",
    "NAMES",
    "Block",
    "q4_0_bytes",
    "q8_0_bytes",
    "quantize_q4_0",
    "quantize_q8_0",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Block:
    """A type. size: values of a block; fields: its record, None for plain floats; served: the format and
    group of its codes, exact: whether these say just what the blocks do.

    floats: records [n, blocks] -> float32 [n, blocks, size]; codes: the integers [n, blocks, size] int8 and
    their scales [n, blocks, groups of a block].
    """

    name: str
    size: int
    record: np.dtype[Any]
    floats: Callable[[Array], Floats]
    served: tuple[str, int] = ("f32", 0)
    exact: bool = True
    codes: Callable[[Array], tuple[Array, Floats]] | None = None

    @property
    def bytes(self) -> int:
        """Of a block."""
        return self.record.itemsize

    def decode(self, records: Array) -> Array:
        """Values [n, k] of records [n, k / size]: float32, or the stored dtype where that is a float."""
        if self.size == 1:
            return records
        return self.floats(records).reshape(len(records), -1)

    def read_codes(self, records: Array) -> Codes:
        """Codes [n, k] of records [n, k / size]; of types with an offset, rounded as `round_weight` does."""
        format, group = self.served
        integers, scales = (self.codes or _rounded(self))(records)
        n = len(records)
        return Codes(format=format, group=group, codes=integers.reshape(n, -1), scales=scales.reshape(n, -1))


def q8_0_bytes(codes: Array, scales: Array) -> Bytes:
    """Codes [n, k] int8 with scales [n, k / 32] as rows of Q8_0 [n, bytes]."""
    return _written(_Q8_0, codes.reshape(len(codes), -1, 32).view(np.uint8), scales)


def q4_0_bytes(codes: Array, scales: Array) -> Bytes:
    """Codes [n, k] -8 .. 7 with scales [n, k / 32] as rows of Q4_0 [n, bytes]."""
    q = (codes + 8).astype(np.uint8).reshape(len(codes), -1, 32)
    return _written(_Q4_0, q[..., :16] | q[..., 16:] << 4, scales)


def quantize_q8_0(values: Floats) -> Bytes:
    """Float32 [n, k] rounded to rows of Q8_0 [n, bytes], halves away from zero, to the bit as llama.cpp does
    (ggml-quants.c, quantize_row_q8_0_ref): the scale is rounded to fp16 after the codes are made of it."""
    blocks = np.asarray(values, np.float32).reshape(len(values), -1, 32)
    scale = np.abs(blocks).max(-1) / np.float32(127)
    scaled = blocks * _inverse(scale)[..., None]
    size = np.abs(scaled)
    whole = np.floor(size)
    whole += np.floor(2 * (size - whole))
    return q8_0_bytes(np.copysign(whole, scaled).astype(np.int8).reshape(len(values), -1), scale)


def quantize_q4_0(values: Floats) -> Bytes:
    """Float32 [n, k] rounded to rows of Q4_0 [n, bytes], to the bit as llama.cpp does
    (quantize_row_q4_0_ref): the scale is the first of the largest magnitude over -8."""
    blocks = np.asarray(values, np.float32).reshape(len(values), -1, 32)
    first = np.abs(blocks).argmax(-1)[..., None]
    scale = np.take_along_axis(blocks, first, -1)[..., 0] / np.float32(-8)
    q = (blocks * _inverse(scale)[..., None] + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return q4_0_bytes(q.astype(np.int8).reshape(len(values), -1) - 8, scale)


def _inverse(scale: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _written(record: np.dtype[Any], qs: Array, scales: Array) -> Bytes:
    out = np.zeros(qs.shape[:2], record)
    out["d"], out["qs"] = scales.astype(np.float16), qs
    return out.view(np.uint8).reshape(len(qs), -1)


def _record(**fields: Any) -> np.dtype[Any]:
    return np.dtype(
        [(name, *(kind if isinstance(kind, tuple) else (kind,))) for name, kind in fields.items()]
    )


_F2 = "<f2"
_Q8_0 = _record(d=_F2, qs=("u1", 32))
_Q4_0 = _record(d=_F2, qs=("u1", 16))
_Q4_1 = _record(d=_F2, m=_F2, qs=("u1", 16))
_Q5_0 = _record(d=_F2, qh="<u4", qs=("u1", 16))
_Q5_1 = _record(d=_F2, m=_F2, qh="<u4", qs=("u1", 16))
_Q4_K = _record(d=_F2, m=_F2, scales=("u1", 12), qs=("u1", 128))
_Q5_K = _record(d=_F2, m=_F2, scales=("u1", 12), qh=("u1", 32), qs=("u1", 128))
_Q6_K = _record(ql=("u1", 128), qh=("u1", 64), scales=("i1", 16), d=_F2)


def _f32(values: Array) -> Floats:
    return values.astype(np.float32)


def _halves(qs: Array) -> Array:
    """Bytes [..., h] as [..., 2h]: the low halves of all, then the high ones."""
    both: Array = np.concatenate([qs & 15, qs >> 4], -1)
    return both


def _q4(r: Array) -> Array:
    return _halves(r["qs"])


def _q5(r: Array) -> Array:
    bits = np.unpackbits(np.ascontiguousarray(r["qh"])[..., None].view(np.uint8), axis=-1, bitorder="little")
    q: Array = _q4(r) | bits << 4
    return q


def _runs(r: Array) -> Array:
    """The low four bits of 256 codes [..., 8, 32], from four runs of 32 bytes."""
    runs = _halves(r["qs"].reshape(*r.shape, 4, 32))
    return runs.reshape(*r.shape, 8, 32)


def _q5_k(r: Array) -> Array:
    bits = r["qh"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    q: Array = _runs(r) | bits << 4
    return q


def _scales_k(r: Array) -> tuple[Floats, Floats]:
    """Scales and offsets [..., 8] of the groups: six bits each, the upper two of the last four apart."""
    a, b, c = (r["scales"][..., i : i + 4] for i in (0, 4, 8))
    scale = np.concatenate([a & 63, c & 15 | a >> 2 & 48], -1)
    offset = np.concatenate([b & 63, c >> 4 | b >> 2 & 48], -1)
    return _f32(r["d"])[..., None] * scale, _f32(r["m"])[..., None] * offset


def _affine_k(r: Array, q: Array) -> Floats:
    scale, offset = _scales_k(r)
    values: Floats = scale[..., None] * _f32(q) - offset[..., None]
    return values.reshape(*r.shape, 256)


def _q6_k(r: Array) -> Array:
    """Codes [..., 16, 16]: two runs of 128, each of four runs of 32."""
    low = r["ql"].reshape(*r.shape, 2, 2, 32)
    low = np.concatenate([low & 15, low >> 4], -2)  # the runs 0, 1 of the low halves, then 2, 3 of the high
    high = r["qh"].reshape(*r.shape, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes: Array = (low | high << 4).astype(np.int8) - 32
    return codes.reshape(*r.shape, 16, 16)


def _scale_6(r: Array) -> Floats:
    scales: Floats = _f32(r["d"])[..., None] * r["scales"]
    return scales


def _scaled(q: Callable[[Array], Array], less: int) -> dict[str, Any]:
    """Types whose values are scale * (q - less)."""

    def codes(r: Array) -> tuple[Array, Floats]:
        return q(r).astype(np.int8) - np.int8(less), _f32(r["d"])[..., None]

    def floats(r: Array) -> Floats:
        integers, scale = codes(r)
        return scale * integers

    return {"floats": floats, "codes": codes}


def _shifted(q: Callable[[Array], Array]) -> Callable[[Array], Floats]:
    """Types whose values are scale * q + offset."""
    return lambda r: _f32(r["d"])[..., None] * q(r) + _f32(r["m"])[..., None]


def _rounded(block: Block) -> Callable[[Array], tuple[Array, Floats]]:
    """int8 in groups of 32, as `gossamer.graph.ops.formats.round_weight` rounds."""

    def codes(r: Array) -> tuple[Array, Floats]:
        values = block.floats(r).reshape(*r.shape, -1, 32)
        scale = _f32((np.abs(values).max(-1) / np.float32(127)).astype(np.float16))
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.where(scale[..., None] == 0, np.float32(0), values / scale[..., None])
        return np.rint(q).clip(-127, 127).astype(np.int8), scale

    return codes


def _codes_6(r: Array) -> tuple[Array, Floats]:
    """The codes as they are; their scales are products of fp16 and int8, here rounded to fp16."""
    with np.errstate(over="ignore"):  # infinity is refused by whoever takes it
        return _q6_k(r), _f32(_scale_6(r).astype(np.float16))


_INT8_32, _INT8_16 = ("int8", 32), ("int8", 16)
BLOCKS: Mapping[int, Block] = {
    0: Block("F32", 1, np.dtype("<f4"), _f32),
    1: Block("F16", 1, np.dtype("<f2"), _f32),
    30: Block("BF16", 1, np.dtype(ml_dtypes.bfloat16), _f32),
    8: Block("Q8_0", 32, _Q8_0, served=_INT8_32, **_scaled(lambda r: r["qs"].view(np.int8), 0)),
    2: Block("Q4_0", 32, _Q4_0, served=("int4", 32), **_scaled(_q4, 8)),
    3: Block("Q4_1", 32, _Q4_1, _shifted(_q4), _INT8_32, exact=False),
    6: Block("Q5_0", 32, _Q5_0, served=_INT8_32, **_scaled(_q5, 16)),
    7: Block("Q5_1", 32, _Q5_1, _shifted(_q5), _INT8_32, exact=False),
    12: Block("Q4_K", 256, _Q4_K, lambda r: _affine_k(r, _runs(r)), _INT8_32, exact=False),
    13: Block("Q5_K", 256, _Q5_K, lambda r: _affine_k(r, _q5_k(r)), _INT8_32, exact=False),
    14: Block(
        "Q6_K",
        256,
        _Q6_K,
        lambda r: (_scale_6(r)[..., None] * _q6_k(r)).reshape(*r.shape, 256),
        _INT8_16,
        exact=False,
        codes=_codes_6,
    ),
}
"""Number of the type -> what it is."""
BY_NAME: Mapping[str, tuple[int, Block]] = {block.name: (kind, block) for kind, block in BLOCKS.items()}
NAMES: Mapping[int, str] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""Types that are known and not read."""
