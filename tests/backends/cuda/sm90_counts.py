"""Kernels compiled for steps of other counts: how many variants of each there are."""

from __future__ import annotations

import torch

from gossamer.backends.cuda.kernels.attention import attention
from gossamer.backends.cuda.kernels.epilogue import Epilogue
from gossamer.backends.cuda.kernels.gemm import gemm
from gossamer.backends.cuda.kernels.norm import rms_norm
from gossamer.backends.cuda.packing import PackedWeight
from tests.backends.cuda.sm90 import compiling, report
from tests.backends.cuda.steps import make_layer, make_step


def main() -> None:
    """Spans, rows and places of tables that are 1, that 16 divides, and neither."""
    cpu = torch.device("cpu")
    weight = PackedWeight(format="bf16", group=0, shape=(64, 64), data=torch.empty(64, 64).bfloat16())
    with compiling() as compiled:
        for spans in ([(40, 0)], [(40, 0)] * 16, [(40, 0), *[(1, 7)] * 14]):
            step = make_step(cpu, spans, groups=2)
            layer = make_layer(cpu, step, 2, 64, "bf16")
            q = torch.empty(step.rows, 4 * 64, dtype=torch.bfloat16)
            for group in (0, 1):
                attention(q, q, layer, step.batch, group, heads=4, kv_heads=2, head_dim=64, scale=0.1)
        for rows in (1, 16, 17):
            x = torch.empty(rows, 64)
            rms_norm(x, x, x[0], 1e-6)
        for rows in (9, 16):
            y = torch.empty(rows, 64).bfloat16()
            gemm(y, y, weight, None, Epilogue(), splits=1)
    report(list({kernel.hash: kernel for kernel in compiled}.values()))


if __name__ == "__main__":
    main()
