"""The formats that models are written in: one entry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gossamer.export.directories import write_bitmask_directory, write_gptq_directory
from gossamer.export.exported import Exported
from gossamer.export.gguf import TYPES as GGUF_TYPES
from gossamer.export.gguf import write_gguf

__all__ = ["FORMATS", "PLANNED", "Format"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """types: how it stores numbers; default: one of them; write: as `write_gguf`."""

    types: tuple[str, ...]
    default: str
    write: Callable[..., Exported]


FORMATS: Mapping[str, Format] = {
    "gguf": Format(types=GGUF_TYPES, default="q8_0", write=write_gguf),
    "gptq": Format(types=("stored",), default="stored", write=write_gptq_directory),
    "compressed-tensors": Format(types=("bitmask",), default="bitmask", write=write_bitmask_directory),
}
"""Name -> what writes it."""
PLANNED = ("onnx", "openvino", "awq")
"""Names that are known and not built yet."""
