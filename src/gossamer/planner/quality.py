"""What is known of the quality of a choice: from a certificate or a file of sensitivities alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from gossamer.checkpoint.json_file import read_json_object
from gossamer.checkpoint.opening import open_checkpoint
from gossamer.config.weight_formats import parse_stored
from gossamer.errors import CheckpointError, ConfigError
from gossamer.passes.weight_formats import matrices as held
from gossamer.planner.model import PlannedModel
from gossamer.planner.objectives import QualityLimit
from gossamer.quality.certificate import CERTIFICATE, Certificate

__all__ = [
    "SENSITIVITY",
    "UNKNOWN",
    "Loss",
    "MatrixLosses",
    "Offered",
    "SensitivityFile",
    "certified",
    "read_sensitivity",
]

SENSITIVITY = "gossamer_sensitivity.json"
_MOST = 64 << 20  # bytes of a file

Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What a choice loses against the original. kl: nats per token; ratio: of perplexities; source: whence;
    all None where nothing is known."""

    kl: float | None = None
    ratio: float | None = None
    source: str | None = None

    @property
    def known(self) -> bool:
        """Whether there is any figure."""
        return self.kl is not None or self.ratio is not None

    def within(self, limit: QualityLimit) -> bool:
        """Whether the limit is known to hold."""
        value, most = (self.kl, limit.kl) if limit.kl is not None else (self.ratio, limit.ratio)
        return value is not None and most is not None and value <= most

    def __str__(self) -> str:
        parts = [] if self.kl is None else [f"KL {self.kl:.4g}"]
        parts += [] if self.ratio is None else [f"perplexity x{self.ratio:.4g}"]
        return ", ".join(parts) or "unknown"


UNKNOWN = Loss()


@checked(frozen=True, slots=True, kw_only=True)
class Offered:
    """A format of some matrices: their bytes, and what the model loses with them alone in it."""

    bytes: Annotated[int, Field(ge=0)]
    kl: Positive


@checked(frozen=True, slots=True, kw_only=True)
class MatrixLosses:
    """Matrices that have one format together. candidates: format as people write it -> offer."""

    names: tuple[str, ...]
    weights: Annotated[int, Field(ge=1)]
    candidates: dict[str, Offered]


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityFile:
    """What `mixed_bits` measured, its formats made as loading makes them. source: the file in words; covers:
    whether it knows every matrix of the model."""

    source: str
    covers: bool
    matrices: tuple[MatrixLosses, ...]

    def uniform(self, format: str) -> Loss:
        """Of all matrices in one format: the sum, since to second order losses add up."""
        found = [unit.candidates.get(format) for unit in self.matrices]
        if not self.covers or any(offer is None for offer in found):
            return UNKNOWN
        return Loss(kl=sum(offer.kl for offer in found if offer is not None), source=self.source)

    def front(self) -> list[tuple[tuple[str, ...], float, float]]:
        """Mixed choices that lose least for their bytes: (format of each unit, bits of a weight, KL), the
        convex hull of the trade, most bits first. Everett 1963: for each price of a byte every unit chooses
        for itself."""
        total = sum(unit.weights for unit in self.matrices)
        found: dict[tuple[str, ...], tuple[float, float]] = {}
        for step in range(97):
            price = 10.0 ** (step / 8.0 - 12.0)  # nats per byte
            chosen = tuple(
                min(
                    unit.candidates,
                    key=lambda f: (unit.candidates[f].kl + price * unit.candidates[f].bytes, f),
                )
                for unit in self.matrices
            )
            offers = [unit.candidates[f] for unit, f in zip(self.matrices, chosen, strict=True)]
            found[chosen] = (8.0 * sum(o.bytes for o in offers) / total, sum(o.kl for o in offers))
        mixed = [(c, *figures) for c, figures in found.items() if len(set(c)) > 1]
        return sorted(mixed, key=lambda each: -each[1])


_MATRICES = TypeAdapter(tuple[MatrixLosses, ...])


def read_sensitivity(path: Path, model: PlannedModel) -> SensitivityFile:
    """The file that `gossamer compress` with mixed bits leaves beside its result, for the model it was made
    of.

    Raises CheckpointError where it is absent, damaged, of another version or of a model of another shape,
    with what is wrong, and ConfigError where its formats are not those that loading makes. Other weights of
    the same shape are said in the source.
    """
    if not path.is_file():
        raise CheckpointError(
            f"no sensitivities at {path}; a recipe of mixed_bits for `gossamer compress` measures them, and "
            f"leaves {SENSITIVITY} in its result"
        )
    raw = read_json_object(path, cap=_MOST, renew="measure anew")
    if raw.get("version") != 1:
        raise CheckpointError(
            f"{path} is of version {raw.get('version')!r}, and this one reads 1; measure anew"
        )
    try:
        matrices = _MATRICES.validate_python(raw.get("matrices"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: matrices.{where} is {first['input']!r:.60}: {first['msg']}") from None
    if not matrices or any(not unit.candidates or not unit.names for unit in matrices):
        raise CheckpointError(f"{path}: no matrices, or one without names or candidates; measure anew")
    _check_formats(path, matrices)
    if raw.get("method") != "rtn":
        raise ConfigError(
            f"{path} knows what formats lose that were made by {str(raw.get('method'))[:20]!r}, and loading "
            'makes them by rounding; a recipe of mixed_bits with method = "rtn" measures those'
        )
    weights = model.graph.weights
    for unit in matrices:
        there = sum(prod(weights[name].shape) for name in unit.names if name in weights)
        if there != unit.weights:
            raise CheckpointError(
                f"{path} is of another model: {unit.names[0][:80]!r} has {unit.weights:,} numbers there, and "
                f"{there:,} in {model.name}"
            )
    source = path.name
    if not model.complete:
        source += " (of weights that are not here)"
    elif open_checkpoint(model.directory, ()).content_key() != raw.get("model"):
        source += " (of other weights, or of a copy)"
    known = {name for unit in matrices for name in unit.names}
    covers = known >= held(model.graph).keys()
    return SensitivityFile(source=source, covers=covers, matrices=matrices)


def _check_formats(path: Path, matrices: tuple[MatrixLosses, ...]) -> None:
    for name in sorted({name for unit in matrices for name in unit.candidates}):
        try:
            parse_stored(name)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}; measure anew") from None


def certified(certificate: Certificate | None, kv: str) -> Loss:
    """What the certificate knows of the model as stored, with keys and values in `kv`."""
    quality = None if certificate is None else certificate.quality
    if quality is None or quality.reference is None or quality.execution.kv != kv:
        return UNKNOWN
    compared = quality.reference
    return Loss(kl=compared.divergence.kl_mean, ratio=compared.ratio, source=CERTIFICATE)
