"""gossamer_certificate.json: how a compressed model was made, of what, and what it lost.

`write_certificate` puts it into the model's directory, `read_certificate` takes it from there.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from gossamer import __version__, _native
from gossamer.checkpoint.json_file import read_json_object
from gossamer.checkpoint.model_writer import write_json
from gossamer.errors import CheckpointError
from gossamer.processor import processor_name
from gossamer.quality.report import Count, Positive, Quality
from gossamer.quality.sizes import ModelRecord

__all__ = [
    "CERTIFICATE", "SCHEMA", "Certificate", "DataRecord", "FileRecord", "RecipeRecord", "StepRecord",
    "Versions", "data_record", "file_records", "read_certificate", "recipe_record", "versions",
    "write_certificate",
]  # fmt: skip

CERTIFICATE = "gossamer_certificate.json"
SCHEMA = 1
_MOST = 16 << 20  # bytes of a certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRecord:
    """The recipe: its name or file, its text with the SHA-256 of it, and what was read from it."""

    name: str
    text: str
    sha256: str
    parsed: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file by name, size and SHA-256."""

    name: str
    bytes: Count
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecord:
    """What calibration and training saw. sha256: of the tokens, as little-endian 32-bit integers."""

    files: tuple[FileRecord, ...]
    tokens: Count
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A step of the recipe: its name and config as it ran, how long it took, what it says of itself."""

    step: str
    config: dict[str, Any]
    seconds: Positive
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """What did it. torch: None where it is not installed; isas: that the processor has kernels for."""

    gossamer: str
    python: str
    numpy: str
    torch: str | None
    processor: str
    isas: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """All of it. created: UTC, ISO 8601; quality: of the compressed model as it is served, with the original
    as its reference (None: not measured)."""

    original: ModelRecord
    compressed: ModelRecord
    recipe: RecipeRecord
    data: DataRecord | None
    seed: int
    steps: tuple[StepRecord, ...]
    quality: Quality | None
    versions: Versions = field(default_factory=lambda: versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA


def recipe_record(name: str, text: str, parsed: Mapping[str, Any]) -> RecipeRecord:
    """The record of a recipe's text."""
    return RecipeRecord(name=name, text=text, sha256=_sha256(text.encode()), parsed=dict(parsed))


def file_records(files: Iterable[Path]) -> tuple[FileRecord, ...]:
    """What the files hold now."""
    records = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records.append(FileRecord(name=path.name, bytes=path.stat().st_size, sha256=digest))
    return tuple(records)


def data_record(files: Iterable[Path | FileRecord], tokens: npt.NDArray[np.int32]) -> DataRecord:
    """The record of calibration or training text: its files (as they are, or as they were read), and the
    tokens taken from them."""
    records = [file if isinstance(file, FileRecord) else file_records([file])[0] for file in files]
    return DataRecord(
        files=tuple(records), tokens=len(tokens), sha256=_sha256(np.asarray(tokens, "<i4").tobytes())
    )


def versions() -> Versions:
    """Those of this process."""
    try:
        torch: str | None = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = None
    return Versions(
        gossamer=__version__,
        python=platform.python_version(),
        numpy=np.__version__,
        torch=torch,
        processor=processor_name(),
        isas=tuple(_native.isas()),
    )


def write_certificate(directory: Path, certificate: Certificate) -> Path:
    """Puts the certificate into a model's directory, aside and then renamed; gives its path.

    Raises CheckpointError where a config or a fact is no JSON value, NaN and infinity included.
    """
    value = asdict(certificate)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as cause:
        raise CheckpointError(f"the certificate cannot be written: {cause}; its facts must be JSON") from None
    path = directory / CERTIFICATE
    write_json(path, value)
    return path


def read_certificate(directory: Path) -> Certificate | None:
    """The certificate in a model's directory; None where there is none.

    Raises CheckpointError for one that is damaged or of another schema, with the field that is wrong.
    """
    path = directory / CERTIFICATE
    if not path.is_file():
        return None
    raw = read_json_object(path, cap=_MOST, renew="compress the model anew, or delete the file")
    if raw.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} is of schema {raw.get('schema')!r}, and this version reads {SCHEMA}; update gossamer, "
            "or delete the file (it says what is known of the model, and is not needed to run it)"
        )
    try:
        return TypeAdapter(Certificate).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path}: {where} is {first['input']!r:.60}: {first['msg']}; compress the model again, or delete "
            "the file (it says what is known of the model, and is not needed to run it)"
        ) from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
