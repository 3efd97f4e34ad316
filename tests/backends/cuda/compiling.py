"""Launches of Triton kernels compiled for an H200 rather than run: no GPU is needed, and what the interpreter
lets pass is found. In a process of its own, since Triton decides once whether it interprets.
"""

from __future__ import annotations

from typing import Any

import torch
from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

__all__ = ["compile_launches"]

_TARGET = GPUTarget("cuda", 90, 32)
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


def compile_launches() -> list[str]:
    """From here on every launch of this process compiles; gives the list that kernels' names go to."""
    done: list[str] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        given = {name: options.pop(name) for name in _OPTIONS if name in options}
        values = dict(zip(self.arg_names, args)) | options
        signature, constants = {}, {}
        for parameter in self.params:
            value = values[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = _POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        build(ASTSource(self, signature, constants), target=_TARGET, options=given)
        done.append(self.fn.__name__)

    JITFunction.run = run
    return done
