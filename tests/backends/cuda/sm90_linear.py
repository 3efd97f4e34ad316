"""Linear layers and experts of every format, compiled for an H200."""

from __future__ import annotations

import torch

from gossamer.backends.cuda.kernels.epilogue import Epilogue
from gossamer.backends.cuda.kernels.experts import experts
from gossamer.backends.cuda.kernels.gemm import gemm
from gossamer.backends.cuda.kernels.linear import linear
from gossamer.backends.cuda.packing import PackedWeight
from tests.backends.cuda.sm90 import compiling, report

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CODES = {"fp8": torch.float8_e4m3fn}
FORMATS = [
    ("f32", 0),
    ("f16", 0),
    ("bf16", 0),
    ("int8", 0),
    ("fp8", 0),
    ("int8", 16),
    ("int4", 128),
    ("uint4", 32),
    ("nf4", 64),
]
N, K = 256, 512


def weight(format: str, group: int, *shape: int) -> PackedWeight:
    """A packed weight of that shape, its numbers whatever lay there."""
    *rows, k = shape
    data = torch.empty(*rows, k, dtype=(FLOATS | CODES).get(format, torch.int8))
    scales = zeros = None
    if format not in FLOATS:
        scales = torch.empty(*rows, k // group, dtype=torch.float16) if group else torch.empty(*rows)
    if format.endswith("4"):
        data = torch.empty(*rows, k // 2, dtype=torch.uint8)
        zeros = torch.empty(*rows, k // group, dtype=torch.uint8) if format == "uint4" else None
    levels = torch.empty(16) if format == "nf4" else None
    return PackedWeight(
        format=format, group=group, shape=shape, data=data, scales=scales, zeros=zeros, levels=levels
    )


def main() -> None:
    """All formats, with few rows, some and many."""
    for format, group in FORMATS:
        gate = weight(format, group, N, K)
        for rows in (1, 16, 128):
            x, out = torch.empty(rows, K, dtype=torch.bfloat16), torch.empty(rows, N)
            if format == "fp8" and rows > 1:  # which torch multiplies
                gemm(out, x, gate, gate, Epilogue(act="silu"))
            linear(out, x, [gate], [torch.empty(N)], residual=out, act="gelu")
            linear(out.bfloat16(), x, [gate, gate], act="silu", gated=True)
            up, down = weight(format, group, 4, N, K), weight(format, group, 4, K, N)
            ids, gains = torch.zeros(rows, 2, dtype=torch.int32), torch.ones(rows, 2)
            experts(torch.empty(rows, K), x, ids, gains, (up, up, down), act="silu")
    int8 = weight("int8", 0, N, K)
    for rows in (1, 128):
        x = torch.empty(rows, K, dtype=torch.int8)
        linear(torch.empty(rows, N), x, [int8], x_scales=torch.empty(rows))


if __name__ == "__main__":
    with compiling() as compiled:
        main()
    report(compiled)
