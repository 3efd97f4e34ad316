"""Autotuning: how each linear layer is cut into tiles, measured once per machine and shape, then remembered.

No choice changes a bit of any result (csrc/program.h: Tuning), so a cache that is lost, shared or out of date
costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from gossamer import _native
from gossamer.backends.cpu.lower import Instruction
from gossamer.graph.ir import Graph
from gossamer.processor import processor_signature

__all__ = ["DEFAULT", "ROWS", "Choice", "TuningFile", "autotune", "layer_name", "tuned_layers"]

ROWS = (1, 16, 256)
"""What stands for few rows (up to 8), some (up to 64) and many; csrc/program.h: kTuningRows."""
_TILES = (4, 6, 8, 12, 16)
_BLOCK_ROWS = (128, 256)
_SECONDS = 0.15  # of measuring for each layer and number of rows
_ROUNDS = (5, 60)  # at least, at most
_GAIN = 0.97  # less than this part of the default's time, or the default stays
_MOST = 1 << 16  # what no choice comes near
_VERSION = 2  # raise when kernels change so much that old choices are worth little


@dataclass(frozen=True, slots=True)
class Choice:
    """Tiles that each worker gets of a layer, and rows that share one sweep over a tile's weights."""

    tiles: int
    block_rows: int


DEFAULT = Choice(6, 256)


class TuningFile:
    """The choices of one machine, instruction set and thread count: a JSON file that starts add to.

    Safe against concurrent writers (the last one's file is whole) and damage (which reads as nothing).
    """

    def __init__(self, directory: Path, cpu: str, isa: str, threads: int) -> None:
        self.machine = f"{cpu}, {isa}, {threads} threads"
        digest = hashlib.sha256(f"{_VERSION} {self.machine}".encode()).hexdigest()[:16]
        self.path = directory / f"{digest}.json"

    def read(self) -> dict[str, dict[int, Choice]]:
        """Layer name -> rows -> choice."""
        try:
            if not self.path.is_file():  # opening a pipe would wait for its writer
                return {}
            held = json.loads(self.path.read_text())["layers"]
            return {
                str(name): {int(rows): Choice(int(c[0]), int(c[1])) for rows, c in choices.items()}
                for name, choices in held.items()
                if all(0 < int(number) < _MOST for c in choices.values() for number in c[:2])
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            return {}

    def add(self, found: Mapping[str, Mapping[int, Choice]]) -> None:
        """Joins choices to those that are there. A full or read-only disk costs the memory of them only."""
        layers = self.read()
        for name, choices in found.items():
            layers.setdefault(name, {}).update(choices)
        text = json.dumps(
            {
                "machine": self.machine,
                "layers": {
                    name: {str(rows): [c.tiles, c.block_rows] for rows, c in choices.items()}
                    for name, choices in layers.items()
                },
            },
            indent=1,
        )
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(text)
                Path(name).replace(self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise


def tuned_layers(directory: Path, isa: str, threads: int) -> dict[str, dict[int, Choice]]:
    """What this machine remembers for an instruction set and thread count: layer -> rows -> choice."""
    return TuningFile(directory, processor_signature(), isa, threads).read()


def layer_name(graph: Graph, instruction: Instruction) -> str:
    """What tells linear layers apart that may be cut differently: op, format, outputs and inputs."""
    weights = [graph.weights[name] for name, _ in instruction.weights]
    outputs = "+".join(str(w.shape[0]) for w in weights)
    return f"{instruction.op} {weights[0].stored} {outputs}x{weights[0].shape[1]}"


def autotune(
    graph: Graph,
    program: _native.Program,
    instructions: Sequence[Instruction],
    *,
    most_rows: Callable[[Instruction], int],
    file: TuningFile | None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[int, Choice]]:
    """Chooses a cut for every linear layer of a program that holds its weights; gives the choices.

    What the file knows is taken from there; the rest is measured (about 0.15 s for each layer shape and
    number of rows) and added to it. most_rows: rows that an instruction may see at most. progress(done, in
    all) counts layers.
    """
    layers: dict[str, list[int]] = {}
    for index, instruction in enumerate(instructions):
        if "linear" in instruction.op and instruction.op != "linear_top1":
            layers.setdefault(layer_name(graph, instruction), []).append(index)
    known = {} if file is None else file.read()
    found: dict[str, dict[int, Choice]] = {}
    chosen: dict[str, dict[int, Choice]] = {}
    for done, (name, indices) in enumerate(layers.items()):
        if progress is not None:
            progress(done, len(layers))
        chosen[name] = {}
        for at, rows in enumerate(ROWS):
            able = [index for index in indices if rows <= most_rows(instructions[index])]
            if not able:  # their places in memory hold fewer
                break
            choice = known.get(name, {}).get(rows)
            if choice is None:
                choice = _measure(program, able, rows)
                found.setdefault(name, {})[rows] = choice
            chosen[name][rows] = choice
            for index in indices:
                program.set_tuning(index, at, choice.tiles, choice.block_rows)
                if instructions[index + 1 : index + 2] and instructions[index + 1].op == "linear_top1":
                    program.set_tuning(index + 1, at, choice.tiles, choice.block_rows)
    if file is not None and found:
        file.add(found)
    return chosen


def _measure(program: _native.Program, indices: Sequence[int], rows: int) -> Choice:
    """The fastest choice; each round times all of them, on another layer of the same shape, so that weights
    come from memory as they do in a step."""
    blocks = _BLOCK_ROWS if rows > min(_BLOCK_ROWS) else _BLOCK_ROWS[-1:]
    choices = [Choice(tiles, block) for tiles in _TILES for block in blocks]
    times: dict[Choice, list[float]] = {c: [] for c in choices}
    least, most = _ROUNDS
    end = time.perf_counter() + _SECONDS
    for i in range(most):
        if i >= least and time.perf_counter() > end:
            break
        for c in choices:
            times[c].append(program.time_linear(indices[i % len(indices)], rows, c.tiles, c.block_rows))
    # Medians: the least of many times favours small tiles, which win now and then and lose on average.
    typical = {c: median(taken) for c, taken in times.items()}
    fastest = min(choices, key=typical.__getitem__)
    return fastest if typical[fastest] < _GAIN * typical[DEFAULT] else DEFAULT
