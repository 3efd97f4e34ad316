"""Recipes: what to do to a model, step by step, as TOML.

    name = "sparse, then small"

    [data]                      # optional; --text wins over it
    text = ["books.txt.xz"]     # UTF-8 text or .xz of it, relative to the recipe
    context = 256               # tokens of a calibration window
    samples = 64                # how many windows calibrate
    tokens = 4000000            # most that are read (training takes what it needs)
    seed = 0

    [[step]]
    prune = "sparsegpt"         # a verb and a method; the method's fields follow
    sparsity = 0.5

    [[step]]
    train = "recover"
    steps = 200

    [[step]]
    quantize = "gptq"
    format = "int4-g128"
    overrides = { "layers.0.*" = "int8" }

The methods and their fields are the classes of `gossamer.config.compression`.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gossamer.config.compression import (
    AWQ,
    GPTQ,
    RTN,
    Distil,
    KVCalibration,
    Magnitude,
    MixedBits,
    Recover,
    SmoothQuant,
    SparseGPT,
    StepConfig,
    Structured,
    Wanda,
)  # fmt: skip
from gossamer.config.compression.checks import check_range
from gossamer.config.weight_formats import weight_formats
from gossamer.errors import ConfigError

__all__ = [
    "METHODS",
    "SHIPPED",
    "Data",
    "Recipe",
    "find_recipe",
    "method_of",
    "needs_text",
    "parse_recipe",
    "reads_text",
]

METHODS: Mapping[str, Mapping[str, type]] = {
    "prune": {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT, "structured": Structured},
    "train": {"recover": Recover, "distil": Distil},
    "quantize": {
        "rtn": RTN, "gptq": GPTQ, "awq": AWQ, "smoothquant": SmoothQuant, "mixed_bits": MixedBits,
        "kv_calibration": KVCalibration,
    },
}  # fmt: skip
"""Verb -> method -> its config."""
SHIPPED = Path(__file__).parent / "recipes"
"""Recipes that --recipe takes by name."""
_NO_TEXT = (RTN, Magnitude)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The text that calibrates and trains. text: files, resolved; tokens: most that are read."""

    text: tuple[Path, ...] = ()
    context: int = 256
    samples: int = 64
    tokens: int = 4_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("context", 2, 2**20), ("samples", 1, 2**20), ("tokens", 4, 2**40), ("seed", 0, 2**31),
        ):  # fmt: skip
            check_range(f"data.{name}", getattr(self, name), low, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Steps in order, and their data. text: the TOML as it was read."""

    name: str
    steps: tuple[StepConfig, ...]
    data: Data = field(default_factory=Data)
    text: str = ""

    def __post_init__(self) -> None:
        if not self.steps:
            raise ConfigError(f"recipe {self.name!r} has no steps; write at least one [[step]]")
        _check_order(self.steps)

    @property
    def key(self) -> str:
        """Changes whenever a step or what it is fed does; names what may be resumed."""
        d = self.data
        return hashlib.sha256(repr((self.steps, d.context, d.samples, d.tokens, d.seed)).encode()).hexdigest()


def method_of(step: StepConfig) -> tuple[str, str]:
    """The verb and the method of a step's config."""
    return next(
        (verb, m) for verb, table in METHODS.items() for m, kind in table.items() if type(step) is kind
    )


def needs_text(recipe: Recipe) -> bool:
    """Whether any step calibrates or trains."""
    return any(reads_text(step) for step in recipe.steps)


def reads_text(step: StepConfig) -> bool:
    """Whether the step calibrates or trains."""
    return not isinstance(step, _NO_TEXT)


def find_recipe(given: str) -> Recipe:
    """A recipe from a file, or by the name of a shipped one. Raises ConfigError."""
    path = Path(given)
    if not path.is_file():
        path = SHIPPED / f"{given}.toml"
        names = sorted(p.stem for p in SHIPPED.glob("*.toml"))
        if Path(given).name != given or not path.is_file():
            near = get_close_matches(given, names, 1)
            raise ConfigError(
                f"no recipe {given!r}: neither a file nor one of {', '.join(names)}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"cannot read the recipe {path}: {cause}") from None
    return parse_recipe(text, name=path.stem, base=path.parent)


def parse_recipe(text: str, *, name: str = "recipe", base: Path = Path()) -> Recipe:
    """A recipe from TOML. base: what file names in it are relative to.

    Raises ConfigError naming the key, for anything that is not understood or cannot be.
    """
    try:
        table = tomllib.loads(text)
        repr(table)  # hexadecimal numbers are read with more digits than a message can name
    except ValueError as cause:  # also of such numbers
        raise ConfigError(f"recipe {name!r} is not TOML: {cause}") from None
    except RecursionError:
        raise ConfigError(f"recipe {name!r} is not TOML that can be read: it is nested too deep") from None
    _known(table, ("name", "description", "data", "step"), f"recipe {name!r}")
    steps = table.get("step", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ConfigError(f"recipe {name!r}: steps are tables, each under [[step]]")
    return Recipe(
        name=str(table.get("name", name)),
        steps=tuple(_step(step, f"step {i + 1} of recipe {name!r}") for i, step in enumerate(steps)),
        data=_data(table.get("data", {}), name, base),
        text=text,
    )


def _data(table: Any, name: str, base: Path) -> Data:
    if not isinstance(table, dict):
        raise ConfigError(f"recipe {name!r}: data is {table!r}; a table [data] is right")
    _known(table, [f.name for f in fields(Data)], f"[data] of recipe {name!r}")
    given = dict(table)
    files = given.pop("text", [])
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) and "\0" not in file for file in files):
        raise ConfigError(f"[data] of recipe {name!r}: text is {files!r}; a list of file names is right")
    for own in fields(Data):
        if own.name in given:
            given[own.name] = _value(given[own.name], own.name, own.default, f"[data] of recipe {name!r}")
    return Data(text=tuple(base / file for file in files), **given)


def _step(table: dict[str, Any], where: str) -> StepConfig:
    verbs = [verb for verb in METHODS if verb in table]
    if len(verbs) != 1:
        raise ConfigError(
            f"{where} says {' and '.join(verbs) or 'nothing of what to do'}; one of prune, train and "
            'quantize with a method is right, such as quantize = "gptq"'
        )
    verb = verbs[0]
    method, methods = table[verb], METHODS[verb]
    if not isinstance(method, str) or method not in methods:
        raise ConfigError(f"{where}: {verb} = {method!r} is unknown; choose {', '.join(methods)}")
    kind = methods[method]
    given = {key: value for key, value in table.items() if key != verb}
    _known(given, [f.name for f in fields(kind)], f"{where} ({verb} = {method!r})")
    for own in fields(kind):
        if own.name in given:
            given[own.name] = _value(given[own.name], own.name, own.default, where)
    step: StepConfig = kind(**given)
    return step


def _value(value: Any, name: str, default: Any, where: str) -> Any:
    """A TOML value as the config's field takes it: lists are tuples there, and types are what they are."""
    if name == "overrides":
        return weight_formats(value)
    if isinstance(value, list):
        value = tuple(value)
    wants = type(default)
    right = default is None or isinstance(value, wants) or (wants is float and type(value) is int)
    if not right or (wants is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: {name} is {value!r}; {_TYPES.get(wants, wants.__name__)} is right")
    return value


_TYPES = {
    int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false", tuple: "a list",
}  # fmt: skip


def _known(table: Mapping[str, Any], known: list[str] | tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, 1)
            raise ConfigError(
                f"{where} has the unknown key {key!r}; "
                + (f"did you mean {near[0]!r}? " if near else "")
                + f"It takes {', '.join(known)}"
            )


def _check_order(steps: tuple[StepConfig, ...]) -> None:
    """Raises ConfigError for an order in which a step would undo or be unable to read one before it."""
    quantized: str | None = None
    sparse: str | None = None
    for i, step in enumerate(steps):
        verb, method = method_of(step)
        here = f"step {i + 1} ({verb} {method})"
        if quantized is not None:
            raise ConfigError(
                f"{here} comes after {quantized}, whose integers it cannot change; quantize last (prune, "
                "then train, then quantize; kv_calibration before the weights)"
            )
        if sparse is not None and isinstance(step, Structured):
            raise ConfigError(f"{here} would cut through the zeros of {sparse}; prune structure first")
        if isinstance(step, Distil) and step.student is not None and i > 0:
            raise ConfigError(
                f"{here} begins with the student {step.student}, so the steps before it would be lost; make "
                "it the first, or leave out student"
            )
        if verb == "quantize" and not isinstance(step, KVCalibration):
            quantized = here
        if verb == "prune" and not isinstance(step, Structured):
            sparse = here
