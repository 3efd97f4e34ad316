"""Attention and what belongs to it, compiled for an H200 with pages of the formats that are named."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from gossamer.backends.cuda.kernels.attention import attention
from gossamer.backends.cuda.kernels.kv_copy import Move, copy_tokens
from gossamer.backends.cuda.kernels.kv_write import kv_write, qkv_write, rope
from tests.backends.cuda.sm90 import compiling, report
from tests.backends.cuda.steps import make_layer, make_step

SHAPES = ((32, 8, 128), (4, 1, 80), (32, 1, 256))
"""Heads, kv heads, and their size."""


def main(formats: list[str]) -> None:
    """Compiles every kernel for the shapes that differ most; of one format those of one shape alone."""
    cpu = torch.device("cpu")
    steps = {
        "decode": make_step(cpu, [(1, 0)] * 3),
        "draft": make_step(cpu, [(4, 9)] * 3),
        "mixed": make_step(cpu, [(40, 0), (1, 7)]),
        "tree": make_step(cpu, [(40, 0), (5, 7)], trees={1: (-1, 0, 0, 1, 1)}),
    }
    with compiling() as compiled:
        for format in formats:
            dtype = torch.float32 if format == "f32" else torch.bfloat16
            for heads, kv_heads, head_dim in SHAPES[: None if len(formats) > 1 else 1]:
                sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
                for name, step in steps.items():
                    layer = make_layer(cpu, step, kv_heads, head_dim, format)
                    q = torch.empty(step.rows, heads * head_dim, dtype=dtype)
                    batch = replace(step.batch, most_slots=4096)
                    attention(q, q, layer, batch, 0, **sizes, scale=0.1)
                    if name == "tree":
                        attention(q, q, layer, batch, 0, **sizes, scale=0.1, softcap=30.0, window=64)
                qkv = torch.empty(step.rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
                norm = torch.empty(head_dim)
                qkv_write(
                    q, qkv, layer, batch, 0, **sizes, inv_freq=norm[: head_dim // 2], magnitude=1.0,
                    q_norm=norm, k_norm=norm, eps=1e-6,
                )  # fmt: skip
                kv = qkv[:, : kv_heads * head_dim]
                kv_write(kv, kv, layer, batch, 0, head_dim=head_dim)
                copy_tokens([layer.keys[None]], [Move(0, 1, 0, 0, 3)])
                rope(q, q, batch.positions, norm[: head_dim // 4], head_dim, 1.0)
    report(compiled)


if __name__ == "__main__":
    main(sys.argv[1:])
