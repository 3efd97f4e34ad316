"""A model written as GGUF v3: BF16, Q8_0 or Q4_0.

Matrices that the model already has as integers in groups keep them where the type can hold them; others
are rounded as llama.cpp rounds them. Vectors, routers and positions are F32, and a matrix whose rows are not
whole blocks is a 16-bit float, as llama.cpp's converter has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gossamer.checkpoint.codes import Codes
from gossamer.checkpoint.gguf import turned_rows
from gossamer.checkpoint.gguf_blocks import (
    BY_NAME,
    q4_0_bytes,
    q8_0_bytes,
    quantize_q4_0,
    quantize_q8_0,
)
from gossamer.checkpoint.gguf_names import ARCHITECTURES, Architecture, Piece, architecture_of, pieces
from gossamer.checkpoint.gguf_writer import LazyBlocks, write_gguf_file
from gossamer.checkpoint.hub import read_config
from gossamer.checkpoint.opening import open_checkpoint
from gossamer.checkpoint.weights import ModelSource, check_tensors
from gossamer.errors import CheckpointError, ConfigError, UnsupportedModelError
from gossamer.export.exported import Exported
from gossamer.export.gguf_metadata import check_metadata, factor_tensors, model_metadata
from gossamer.export.gguf_vocabulary import vocabulary
from gossamer.graph.families import build_graph
from gossamer.graph.families.names import fit_names
from gossamer.graph.ir import Graph
from gossamer.graph.ops.formats import NF4
from gossamer.graph.weights import leaves

__all__ = ["TYPES", "write_gguf"]

TYPES = ("bf16", "q8_0", "q4_0")
_FILE_TYPE = {"bf16": 32, "q8_0": 7, "q4_0": 2}  # llama.cpp's enum llama_ftype
_PLAIN = ("ffn_gate_inp.weight", "position_embd.weight")
_ROWS = 16 << 20  # bytes of float32 rows in memory at a time
_GROUP = 32

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One of the file's. names: those of the model's tensors it is made of, as its checkpoint spells them."""

    source: ModelSource
    names: tuple[str, ...]
    piece: Piece
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        shape = self.source.info(self.names[0]).shape
        shape = shape[::-1] if self.piece.transposed else shape
        return (len(self.names), *shape) if self.piece.stacked else shape

    @property
    def keeps(self) -> bool:
        """Whether its integers are written as they are."""
        return not self.piece.transposed and all(
            _holds(self.kind, *self.source.stored(name)) for name in self.names
        )

    def make(self) -> Iterator[Array]:
        """Its bytes, rows at a time."""
        for name in self.names:
            yield from self._plane(name)
            self.source.release(name)

    def _plane(self, name: str) -> Iterator[Array]:
        shape = self.source.info(name).shape
        whole = None
        if self.piece.transposed:
            whole = self.source.read(name).T
            shape = whole.shape
        rows = shape[0]
        turned = np.argsort(turned_rows(rows, self.piece.heads)) if self.piece.heads else None
        # Rows of a head change places within it.
        unit = rows // self.piece.heads if self.piece.heads else 1
        step = max(1, _ROWS // (4 * max(shape[-1], 1)) // unit) * unit
        keeps = self.keeps
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            order = slice(None) if turned is None else turned[start:stop] - start
            if keeps:
                codes = self.source.read_codes(name, start, stop)
                yield _code_bytes(self.kind, codes)[order]
            else:
                values = self.source.read_rows(name, start, stop) if whole is None else whole[start:stop]
                floats = np.asarray(values, np.float32)[order]
                if self.piece.shift:
                    floats = floats + np.float32(self.piece.shift)
                yield _float_bytes(self.kind, floats, name)


def write_gguf(
    path: Path,
    directory: Path,
    *,
    type: str,
    name: str = "model",
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes the model of a directory as one GGUF file, aside and then renamed.

    type: "bf16", "q8_0" or "q4_0"; name: general.name; force: replaces a file that is there; progress: (bytes
    done, bytes in all). Raises ConfigError for a type that is unknown, a path without .gguf or one that is
    taken, UnsupportedModelError for a model that GGUF cannot hold, CheckpointError for a damaged one,
    OSError.
    """
    if type not in TYPES:
        raise ConfigError(f"GGUF of the type {type!r} is not written; choose {', '.join(TYPES)}")
    if path.suffix != ".gguf":
        raise ConfigError(f"{path} does not end in .gguf, by which readers know the format; name it so")
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already; --force replaces it, or write elsewhere")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no directory {path.parent}; make it, or write elsewhere")
    config = read_config(directory)
    graph = build_graph(config, name=name)
    found = architecture_of(str(config["architectures"][0]))
    if found is None:
        classes = [c for a in ARCHITECTURES.values() for c in a.classes]
        raise UnsupportedModelError(
            f"{config['architectures'][0]} is no model that GGUF has here; it has {', '.join(classes)}"
        )
    source = open_checkpoint(directory)
    planned = _plan(graph, found, source, type)
    factors = factor_tensors(config, graph)
    shapes = {n: t.shape for n, t in planned.items()} | {n: v.shape for n, v in factors.items()}
    tokens, notes = vocabulary(directory, graph.vocab)
    metadata: dict[str, Any] = {"general.architecture": found.name, "general.type": "model"}
    metadata |= {"general.name": name}
    metadata |= {"general.file_type": _FILE_TYPE[type], "general.quantization_version": 2}
    metadata |= model_metadata(config, graph, found) | tokens
    check_metadata(metadata, shapes, factors, graph)
    tensors = {n: LazyBlocks(t.kind, t.shape, t.make) for n, t in planned.items()}
    for factor, values in factors.items():
        tensors[factor] = LazyBlocks("F32", values.shape, partial(iter, [values]))
    odd = [n for n, t in planned.items() if t.kind in ("F16", "BF16") and type != "bf16"]
    if odd:
        notes.append(
            f"{len(odd)} matrices ({', '.join(odd[:2])}, ..) have rows that are not whole blocks of "
            f"{_GROUP} and are stored as {planned[odd[0]].kind}"
        )
    written = write_gguf_file(path, metadata, tensors, progress)
    return Exported(
        path=path,
        bytes=written,
        tensors=dict(Counter(t.kind for t in tensors.values())),
        kept=sum(t.keeps for t in planned.values()),
        notes=notes,
    )


def _plan(graph: Graph, found: Architecture, source: ModelSource, type: str) -> dict[str, _Tensor]:
    """The file's tensors, each of those that the graph reads."""
    names = source.names()
    fitted = fit_names(graph, names)
    check_tensors(fitted, {name: source.info(name).shape for name in names})
    spelled = {
        leaf.name: own.name
        for plain, weight in zip(graph.weights.values(), fitted.weights.values(), strict=True)
        for leaf, own in zip(leaves(plain.expr), leaves(weight.expr), strict=True)
    }
    attention = next(n for n in graph.nodes if n.op == "attention").attrs
    stacks = [graph.weights[n.weights[0]].shape[0] for n in graph.nodes if n.op == "experts"]
    known = pieces(
        found,
        layers=graph.layers,
        heads=attention["heads"],
        kv_heads=graph.kv_groups[0].kv_heads,
        experts=max(stacks, default=0),
    )
    planned = {}
    for name, piece in known.items():
        own = tuple(spelled.pop(n) for n in piece.names if n in spelled)
        if own:
            planned[name] = _Tensor(source, own, piece, _kind(name, own[0], piece, source, type))
    if spelled:
        raise UnsupportedModelError(
            f"GGUF's {found.name} has no tensor for {', '.join(list(spelled)[:4])}; the model cannot be "
            "written as it"
        )
    return planned


def _kind(name: str, own: str, piece: Piece, source: ModelSource, type: str) -> str:
    """The type of a tensor."""
    info = source.info(own)
    if len(info.shape) == 1 or name.endswith(_PLAIN):
        return "F32"
    width = info.shape[0] if piece.transposed else info.shape[-1]
    if type != "bf16" and width % _GROUP == 0:
        return type.upper()
    return "BF16" if type == "bf16" or info.dtype == "BF16" else "F16"


def _holds(kind: str, format: str, group: int) -> bool:
    """Whether a type of GGUF can hold the codes of a format: all whose scales are fp16, of whole blocks."""
    held = {"Q8_0": ("int8", "int4", "uint4", "nf4"), "Q4_0": ("int4",)}.get(kind, ())
    return format in held and group > 0 and group % _GROUP == 0


def _code_bytes(kind: str, codes: Codes) -> Array:
    """Rows of blocks that say what the codes say."""
    integers, blocks = codes.codes, codes.codes.shape[1] // _GROUP
    repeats = codes.group // _GROUP
    if codes.format == "nf4":
        integers = np.asarray(NF4, np.int8)[integers]
    if codes.zeros is not None:
        zeros = np.repeat(codes.zeros.astype(np.int8), codes.group, 1)[:, : integers.shape[1]]
        integers = integers - zeros
    scales = np.repeat(codes.scales, repeats, 1)[:, :blocks]
    return (q8_0_bytes if kind == "Q8_0" else q4_0_bytes)(np.ascontiguousarray(integers), scales)


def _float_bytes(kind: str, values: Array, name: str) -> Array:
    if kind == "F32":
        return values.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        made: Array = (
            values.astype(ml_dtypes.bfloat16 if kind == "BF16" else np.float16)
            if BY_NAME[kind][1].size == 1
            else values
        )
    if not np.isfinite(made.astype(np.float32)).all():
        raise CheckpointError(
            f"tensor {name!r} holds NaN, infinity or numbers that {kind} cannot hold; the checkpoint is "
            "damaged, or write another type"
        )
    if kind in ("F16", "BF16"):
        return made
    return quantize_q8_0(values) if kind == "Q8_0" else quantize_q4_0(values)
