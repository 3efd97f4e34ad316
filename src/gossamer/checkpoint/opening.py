"""A model directory's tensors, plain, quantized or in a GGUF file, by what lies in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from gossamer.checkpoint.awq import open_awq
from gossamer.checkpoint.bitsandbytes import open_bitsandbytes
from gossamer.checkpoint.compressed_tensors_reader import open_compressed_tensors
from gossamer.checkpoint.gguf import GGUFCheckpoint
from gossamer.checkpoint.gguf_directory import POINTER, open_pointed
from gossamer.checkpoint.gptq import open_gptq
from gossamer.checkpoint.hub import read_quantization
from gossamer.checkpoint.packed import PackedCheckpoint, TensorFile
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.checkpoint.weights import ModelSource, WeightSource
from gossamer.errors import UnsupportedModelError

__all__ = ["notes_of", "open_checkpoint"]

_Opener = Callable[[TensorFile, Mapping[str, Any], Collection[str]], PackedCheckpoint]
_METHODS: dict[str, _Opener] = {
    "awq": open_awq,
    "bitsandbytes": open_bitsandbytes,
    "compressed-tensors": open_compressed_tensors,
    "gptq": open_gptq,
}


def open_checkpoint(directory: Path, ignore: Collection[str] = ()) -> ModelSource:
    """The tensors of a model directory. ignore: fields of config.json to treat as absent.

    Raises CheckpointError, and UnsupportedModelError for a quantization that cannot be read.
    """
    if (directory / POINTER).is_file():
        return open_pointed(directory)
    file = Checkpoint(directory)
    settings = read_quantization(directory, ignore)
    if settings is None:
        return file
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # of early releases
    if not isinstance(method, str) or method not in _METHODS:
        raise UnsupportedModelError(
            f"config.json: quantization_config.quant_method is {method!r}; {', '.join(_METHODS)} can be "
            "read, and the unquantized model with --quantization would work"
        )
    return _METHODS[method](file, settings, ignore)


def notes_of(source: WeightSource) -> tuple[str, ...]:
    """What reading a checkpoint changes or leaves out, in sentences."""
    if isinstance(source, GGUFCheckpoint):
        return tuple(source.notes())
    return source.notes if isinstance(source, PackedCheckpoint) else ()
