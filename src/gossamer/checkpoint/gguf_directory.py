"""A GGUF file as a model directory: config.json and tokenizer made of its metadata, and where the file lies.

The directory stands in the cache under a key of the file's content, so that everything that reads a model
finds what it knows; the weights stay in the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from gossamer.checkpoint.cache_directory import cache_directory
from gossamer.checkpoint.gguf import GGUFCheckpoint, content_key
from gossamer.checkpoint.gguf_config import model_config
from gossamer.checkpoint.gguf_file import GGUFFile
from gossamer.checkpoint.gguf_tokenizer import tokenizer_config, tokenizer_json
from gossamer.checkpoint.hub import GGUF_POINTER
from gossamer.checkpoint.json_file import read_json_object
from gossamer.errors import CheckpointError

__all__ = ["POINTER", "gguf_directory", "open_pointed"]

POINTER = GGUF_POINTER
"""In such a directory: {"file": the path of the GGUF file}."""
_VERSION = 2  # raise when what is made of metadata changes


def gguf_directory(path: Path) -> Path:
    """The directory that stands for a GGUF file, made where the cache has none yet.

    Raises CheckpointError, TokenizerError, UnsupportedModelError for a file that cannot be served.
    """
    path = path.resolve()
    file = GGUFFile(path)
    directory = cache_directory() / "gguf" / f"{content_key(file)}-{_VERSION}"
    if (directory / POINTER).is_file() and (directory / "config.json").is_file():
        if read_json_object(directory / POINTER).get("file") != str(path):
            _write(directory / POINTER, {"file": str(path)})  # the same content elsewhere
        return directory
    config = model_config(file)
    source = str(path)
    files = {
        "tokenizer.json": tokenizer_json(file.metadata, source),
        "tokenizer_config.json": tokenizer_config(file.metadata, source),
        "generation_config.json": {k: config[k] for k in ("bos_token_id", "eos_token_id") if k in config},
        POINTER: {"file": source},
        "config.json": config,
    }
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".making-"))
        try:
            for name, value in files.items():
                _write(aside / name, value)
            with contextlib.suppress(OSError):  # a broken one of before, or another process was as quick
                shutil.rmtree(directory)
            os.replace(aside, directory)
        except OSError:
            if not (directory / "config.json").is_file():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as cause:
        raise CheckpointError(
            f"cannot write {directory}, where config.json and tokenizer of {path} go: {cause.strerror}; "
            "make room or set GOSSAMER_CACHE to a directory that can be written"
        ) from None
    return directory


def open_pointed(directory: Path) -> GGUFCheckpoint:
    """The weights of a directory that `gguf_directory` made. Raises CheckpointError where it is gone."""
    path = read_json_object(directory / POINTER).get("file")
    if not isinstance(path, str) or not Path(path).is_file():
        raise CheckpointError(
            f"{directory} stands for {path!r}, which is not there; pass the GGUF file itself"
        )
    return GGUFCheckpoint(path)


def _write(path: Path, value: object) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    os.replace(aside, path)
