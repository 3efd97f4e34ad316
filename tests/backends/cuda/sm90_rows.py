"""Ops over rows and sampling, compiled for an H200 with the shapes of a model of 8B."""

from __future__ import annotations

import numpy as np
import torch

from gossamer.backends.cpu.plan import SAMPLE_ROW
from gossamer.backends.cuda.kernels import elementwise, embed, norm, routing, sampling
from tests.backends.cuda.sm90 import compiling, report


def main() -> None:
    """All of them."""
    for dtype in (torch.bfloat16, torch.float32):
        for width in (4096, 100):
            x, y, z = (torch.empty(8, width, dtype=dtype) for _ in range(3))
            w, integers, scales = torch.empty(width), torch.empty(8, width, dtype=torch.int8), torch.empty(8)
            norm.rms_norm(y, x, w, 1e-5)
            norm.rms_norm(y, x, w[: width // 4], 1e-5)
            norm.layer_norm(y, x, w, w, 1e-5)
            norm.rms_norm_add(y, x, z, w, 1e-5)
            norm.add_rms_norm(z, y, x, z, w, 1e-5)
            norm.quantize_rows(integers, scales, x)
            norm.quantize_rows(integers, scales, x, 0.1)
            norm.rms_norm_quantize(integers, scales, x, w, 1e-5)
            norm.quantize_rows(integers.view(torch.float8_e4m3fn), scales, x)
        for act in ("silu", "gelu", "gelu_tanh", "relu"):
            elementwise.act_mul(y, x, z, act)
            elementwise.activation(y, x, act)
        elementwise.add(y, x, z)
        elementwise.scale(y, x, 0.5)
        elementwise.softcap(y, x, 30.0)
        ids = torch.empty(8, dtype=torch.int32)
        embed.embed(y, ids, x, 2.0)
        embed.name_tokens(ids, ids)
        embed.take_columns(y, x, torch.empty(100, dtype=torch.int32))
        embed.embed_packed(y, ids, integers, scales, format="int8")
        embed.embed_packed(y, ids, integers.view(torch.float8_e4m3fn), scales, format="fp8")
        pairs, zeros = torch.empty(8, 50, dtype=torch.uint8), torch.empty(8, 4, dtype=torch.uint8)
        for format in ("int4", "uint4", "nf4"):
            groups = torch.empty(8, 4, dtype=torch.float16)
            embed.embed_packed(y, ids, pairs, groups, zeros, format=format, group=32)
        for experts, k in ((8, 2), (128, 8)):
            taken, shares = torch.empty(8, k, dtype=torch.int32), torch.empty(8, k, dtype=dtype)
            routing.top_k_experts(taken, shares, torch.empty(8, experts, dtype=dtype), k, True)
    for vocab in (128256, 500):
        sampler, logits = sampling.DeviceSampler(torch.device("cpu"), 8, vocab), torch.empty(8, vocab)
        sampler.greedy(logits)
        rows, nothing = np.zeros(8, SAMPLE_ROW), np.zeros(1, np.int32)
        rows["target"], rows["mask_row"], rows["repetition"], rows["temperature"] = -1, -1, 1, 1
        for top_p, logprobs, presence in ((0.9, 3, 1), (1.0, -1, 0)):
            rows["top_p"], rows["logprobs"], rows["presence"] = top_p, logprobs, presence
            sampler.sample(logits, rows, nothing, nothing, nothing.astype(np.float32), nothing)


if __name__ == "__main__":
    with compiling() as compiled:
        main()
    report(compiled)
