"""Which reader a model directory's weights need."""

from __future__ import annotations

from pathlib import Path

from gossamer.checkpoint.gguf import GGUFCheckpoint
from gossamer.checkpoint.gguf_directory import POINTER, open_pointed
from gossamer.checkpoint.safetensors import Checkpoint

__all__ = ["open_checkpoint"]


def open_checkpoint(directory: Path) -> Checkpoint | GGUFCheckpoint:
    """The weights of a model directory. Raises CheckpointError where there are none that can be read."""
    return open_pointed(directory) if (directory / POINTER).is_file() else Checkpoint(directory)
