"""From the name a user types to a directory with config.json: local, shipped in the package, or the hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gossamer.checkpoint.json_file import read_json_object
from gossamer.errors import CheckpointError, ConfigError
from gossamer.graph.families.fields import with_plain_rotary

__all__ = [
    "GGUF_POINTER", "POCKET", "POCKET_HALF", "has_weights", "read_config", "read_quantization",
    "resolve_config", "resolve_model",
]  # fmt: skip

POCKET = "gossamer/pocket"
POCKET_HALF = "gossamer/pocket-half"
_SHIPPED = {POCKET: "pocket", POCKET_HALF: "pocket-half"}  # folders of gossamer/models
# Not importlib.resources: under an editable install its path is of two directories at once.
_PACKAGE = Path(__file__).resolve().parents[1]
GGUF_POINTER = "gguf.json"
"""In a directory that stands for a GGUF file."""
MAX_CONFIG = 4 << 20  # bytes; real ones have a few kilobytes
_QUANTIZATION = ("quantization_config", "compression_config")
_EARLY_GPTQ = "quantize_config.json"
# Pickle is never even downloaded; folders (original/, onnx/) and consolidated.* hold second copies.
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The local directory of a model.

    model: a directory, a .gguf file (or a directory with one and no other model), "gossamer/pocket" or
    "gossamer/pocket-half" (shipped in the package: a model and its smaller student), or a hub id such as
    "Qwen/Qwen2.5-0.5B"; revision: branch, tag or commit on the hub. Without a network (or with
    HF_HUB_OFFLINE=1) a hub id comes from the local cache. Raises CheckpointError when there is no such model,
    ConfigError for a revision of a directory or file, and what `gguf_directory` raises.
    """
    path = Path(os.path.expanduser(model))  # Path's own raises where there is no such user
    try:
        if model and path.exists():  # Path("") would be the working directory
            if revision is not None:
                kind = "directory" if path.is_dir() else "file"
                raise ConfigError(
                    f"revision {revision!r} belongs to a hub id, {model[:80]!r} is a {kind}; leave it out"
                )
            return _local(path)
    except OSError as error:  # a name beyond what file systems take, or a folder closed to us
        raise CheckpointError(f"cannot look at {model[:80]!r}: {error.strerror}; check the path") from None
    if model in _SHIPPED:
        return _shipped(model)
    if _looks_local(model):
        raise CheckpointError(
            f"no model directory at {model!r}; check the path, or pass a hub id (owner/name)"
        )
    return _from_hub(model, revision)


def resolve_config(model: str, revision: str | None = None) -> Path:
    """As `resolve_model`, but of a hub id nothing is fetched but config.json (and what early GPTQ had beside
    it): for plans. The weights may be there all the same, from an earlier download.

    Raises what `resolve_model` does.
    """
    if model in _SHIPPED or _looks_local(model) or Path(model).exists():
        return resolve_model(model, revision)
    return _config_from_hub(model, revision)


def has_weights(directory: Path) -> bool:
    """Whether a model directory holds tensors, or stands for a GGUF file."""
    return (directory / GGUF_POINTER).is_file() or any(directory.glob("*.safetensors"))


def read_config(directory: Path) -> dict[str, Any]:
    """The object in a model directory's config.json, less what it says of quantization: that belongs to its
    tensors, and `gossamer.checkpoint.opening` reads it. Rotary fields are those of `with_plain_rotary`.

    Raises CheckpointError when it is missing, larger than 4 MiB or not a JSON object.
    """
    return with_plain_rotary({k: v for k, v in _config(directory).items() if k not in _QUANTIZATION})


def read_quantization(directory: Path, ignore: Collection[str] = ()) -> dict[str, Any] | None:
    """What config.json, or the file that early GPTQ had beside it, says of quantization; None: nothing.

    ignore: fields of config.json to treat as absent. Raises CheckpointError as `read_config` does.
    """
    for key in _QUANTIZATION:
        settings = _config(directory).get(key)
        if settings and key not in ignore:
            if not isinstance(settings, dict):
                raise CheckpointError(
                    f"{directory / 'config.json'}: {key} is {settings!r}; an object is right"
                )
            return settings
    if (directory / _EARLY_GPTQ).is_file() and not set(_QUANTIZATION) & set(ignore):
        return {"quant_method": "gptq", **read_json_object(directory / _EARLY_GPTQ, cap=MAX_CONFIG)}
    return None


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"no config.json in {directory}; pass the directory of a Hugging Face model "
            "(config.json, model.safetensors, tokenizer.json)"
        )
    return read_json_object(path, cap=MAX_CONFIG)


def _local(path: Path) -> Path:
    """The directory of a path that exists: itself, or what stands for a GGUF file."""
    from gossamer.checkpoint.gguf_directory import gguf_directory

    if path.is_dir():
        if (path / "config.json").exists() or any(path.glob("*.safetensors")):
            return path  # without its config.json it is damaged, whatever lies beside
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            raise CheckpointError(
                f"{path} has {len(found)} GGUF files ({', '.join(f.name for f in found[:3])}, ..) and no "
                "config.json; pass one of the files"
            )
        return gguf_directory(found[0]) if found else path
    if path.suffix == ".gguf":
        return gguf_directory(path)
    raise CheckpointError(
        f"{path} is a file and no GGUF; pass the directory that holds it, with its config.json"
    )


def _shipped(model: str) -> Path:
    directory = _PACKAGE / "models" / _SHIPPED[model]
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{model} is missing from this installation (looked in {directory}); install gossamer again"
        )
    return directory


def _close_to_shipped(model: str) -> str | None:
    short = {name.partition("/")[2]: name for name in _SHIPPED}
    close = get_close_matches(model.lower(), (*_SHIPPED, *short), 1, 0.75)
    return short.get(close[0], close[0]) if close else None


def _looks_local(model: str) -> bool:
    if model.startswith((".", "/", "~", "\\")) or model.endswith((".gguf", ".safetensors", ".bin", ".pt")):
        return True
    return not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", model, re.ASCII) or ".." in model


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(model, revision):
        # Falls back to the cache by itself when offline or when the hub cannot be reached.
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        )


def _config_from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with _hub_errors(model, revision):
        found = Path(hf_hub_download(model, "config.json", revision=revision)).parent
        if read_quantization(found) is None:
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(model, _EARLY_GPTQ, revision=revision)
        return found


@contextlib.contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's library raises into CheckpointError with what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = model if revision is None else f"{model} at revision {revision!r}"
    try:
        yield
    except CheckpointError:
        raise
    except GatedRepoError:
        raise CheckpointError(
            f"{name} is gated: accept its terms on https://huggingface.co/{model}, "
            "then log in (`hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{model} has no revision {revision!r}; leave it out for the newest") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"no model {model!r}: no such directory here, and the hub has none of that name "
            "(or it is private: `hf auth login`)"
        ) from None
    except LocalEntryNotFoundError:
        meant = _close_to_shipped(model)
        raise CheckpointError(
            f"{name} is not a directory here, is not in the local cache and the hub cannot be reached; "
            + (f"did you mean {meant}? Else " if meant else "")
            + f"connect{' (and unset HF_HUB_OFFLINE)' if os.environ.get('HF_HUB_OFFLINE') else ''}, or "
            f"download it elsewhere with `hf download {model}` and pass its directory"
        ) from None
    except Exception as cause:  # its HTTP library differs by version, and so do the errors it lets through
        raise CheckpointError(f"cannot download {name}: {cause}; try again or pass a directory") from None
