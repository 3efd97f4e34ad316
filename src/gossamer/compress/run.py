"""The life of a compression: text, estimate, steps one after the other, measured quality, certificate.

Everything happens in a directory beside the result, `.NAME.compress/`: finished steps stand there whole, the
one at work writes into NN.part and keeps what is dear in NN.scratch. Interrupted, the same call goes on. The
result appears under its name in one rename, when all of it is there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.checkpoint.hub import resolve_model
from gossamer.checkpoint.model_writer import write_json
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.checkpoint.weights import ModelSource
from gossamer.compress.certify import certify, measure_loss
from gossamer.compress.distill.step import check_teacher
from gossamer.compress.model import check_floats, open_model
from gossamer.compress.prune.unstructured import skipped_matrices
from gossamer.compress.quantize.plan import formats_of
from gossamer.compress.recipe import Recipe, method_of, needs_text, reads_text
from gossamer.compress.step import Estimate, Ids, Job, StepRunner
from gossamer.compress.text import Windows, read_tokens, spread_windows
from gossamer.config.compression import (
    AWQ,
    GPTQ,
    RTN,
    Distil,
    MixedBits,
    SmoothQuant,
    StepConfig,
    Structured,
)
from gossamer.config.compression.prune import Unstructured
from gossamer.config.compression.train import Training
from gossamer.errors import ConfigError, MemoryBudgetError
from gossamer.graph.ir import Graph
from gossamer.memory import available_memory
from gossamer.quality.certificate import FileRecord, file_records

__all__ = ["Compression", "Watch", "compress", "estimates"]

_MODULES = {"prune": "prune.{}", "train": "distill.step", "quantize": "quantize.{}"}
"""Verb -> the module whose `estimate` and `run` it is, {} being the method."""
_ESTIMATES_ERR = 1.5  # times
_HELD_BACK = 0.05  # of the text, at most _HELD_TOKENS: what quality is measured on
_HELD_TOKENS = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What a front end wants to hear, and whether it wants to stop."""

    estimate: Callable[[Sequence[tuple[str, Estimate]]], None] = field(default=lambda estimates: None)
    """Before the first step: what each will take."""
    step: Callable[[int, str, bool], None] = field(default=lambda index, name, resumed: None)
    """A step begins; resumed: it was finished before."""
    progress: Callable[[str, int, int], None] = field(default=lambda what, done, total: None)
    stopping: Callable[[], bool] = field(default=lambda: False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What is to be done. model: a directory or hub id; text, held_out: files that win over the recipe's and
    over a part of it held back; threads: of torch, None for all processors."""

    model: str
    recipe: Recipe
    out: Path
    text: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    threads: int | None = None
    measure: bool = True
    """Whether to measure what was lost; without it the certificate says that it is unknown."""

    @property
    def work(self) -> Path:
        """Where steps are kept until the result is whole."""
        return self.out.parent / f".{self.out.name}.compress"


def estimates(graph: Graph, recipe: Recipe) -> list[tuple[str, Estimate]]:
    """What each step will take on this machine, roughly: speed is probed by a product of matrices."""
    flops = _flops()
    tokens = recipe.data.samples * recipe.data.context
    return [(_name(step), _module(step).estimate(step, graph, tokens, flops)) for step in recipe.steps]


def compress(given: Compression, watch: Watch | None = None) -> Path:
    """Does all of it; gives the result's directory.

    Raises ConfigError, CheckpointError, MemoryBudgetError before anything is written where it cannot be;
    Stopped where the watcher asks for it; OSError for a full disk. Whatever happens, the same call goes on.
    """
    watch = watch or Watch()
    recipe, out = given.recipe, given.out
    _check_out(out)
    model = resolve_model(given.model)
    graph, source = open_model(model)
    check_floats(graph, "compression")
    if needs_text(recipe) and not (given.text or recipe.data.text):
        raise ConfigError(
            "the recipe calibrates or trains, and no text is given; name UTF-8 files (or .xz of them) with "
            "--text, or under [data] in the recipe"
        )
    torch.set_num_threads(given.threads or len(os.sched_getaffinity(0)))
    _check_formats(graph, recipe)
    for index, step in enumerate(recipe.steps):
        if isinstance(step, Distil) and not _is_done(given, index):  # afterwards the teacher may go
            check_teacher(step, graph, model)
    expected = estimates(graph, recipe)
    _check_disk(given, expected, source)
    _check_memory(expected)
    watch.estimate(expected)
    with _workplace(given.work) as work:
        _check_out(out)  # another run may have finished since
        text, held = _text(given, model, work)
        _check_state(given, work, source.content_key(), text)
        at, steps = model, []
        for index, step in enumerate(recipe.steps):
            at, facts = _step(given, index, step, work, at, model, text, watch)
            steps.append(facts)
        quality = None
        if given.measure:
            quality = measure_loss(
                given.model, at, held, out.name, threads=torch.get_num_threads(), progress=watch.progress
            )
        certify(given.model, model, at, recipe, steps, _files(work), text, quality, out.name)
        if out.is_dir():
            out.rmdir()  # an empty one
        os.replace(at, out)
        shutil.rmtree(work, ignore_errors=True)
    return out


def _check_formats(graph: Graph, recipe: Recipe) -> None:
    """Raises ConfigError now for formats that the model cannot take and names that it lacks, rather than
    after hours of other steps; a step that changes the model's shape leaves that to those after it."""
    for step in recipe.steps:
        if isinstance(step, Structured) or (isinstance(step, Distil) and step.student is not None):
            return
        if isinstance(step, Unstructured):
            skipped_matrices(graph, step.skip)
        if isinstance(step, MixedBits):
            formats = step.candidates
        elif isinstance(step, SmoothQuant):
            formats = ("int8",)
        else:
            formats = (step.format,) if isinstance(step, RTN | GPTQ | AWQ) else ()
        overrides = getattr(step, "overrides", ())
        for format in formats:
            formats_of(graph, format, overrides)


def _step(
    given: Compression,
    index: int,
    step: StepConfig,
    work: Path,
    model: Path,
    original: Path,
    text: Ids,
    watch: Watch,
) -> tuple[Path, dict[str, Any]]:
    """One step, unless it stands there whole: its directory, and its facts."""
    place, part, scratch, facts_at = (
        work / f"{index:02d}{end}" for end in ("", ".part", ".scratch", ".json")
    )
    done = _is_done(given, index)
    watch.step(index, _name(step), done)
    if done:
        return place, json.loads(facts_at.read_text())
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    scratch.mkdir(exist_ok=True)
    data = given.recipe.data
    job = Job(
        model=model,
        original=original,
        out=part,
        scratch=scratch,
        text=text,
        context=data.context,
        samples=data.samples,
        seed=data.seed,
        threads=torch.get_num_threads(),
        progress=watch.progress,
        stopping=watch.stopping,
    )
    job.check_stop()
    began = time.monotonic()
    found = _module(step).run(step, job)
    verb, method = method_of(step)
    facts = {"verb": verb, "method": method, "seconds": round(time.monotonic() - began, 1)} | found
    write_json(facts_at, facts)
    os.replace(part, place)
    shutil.rmtree(scratch, ignore_errors=True)
    if model != original:
        shutil.rmtree(model, ignore_errors=True)  # the step before this one is not needed any more
    return place, facts


def _is_done(given: Compression, index: int) -> bool:
    """Whether the step's result, or a later one's, stands there whole."""
    return any((given.work / f"{i:02d}").is_dir() for i in range(index, len(given.recipe.steps)))


def _text(given: Compression, model: Path, work: Path) -> tuple[Ids, Ids]:
    """The text to work with, and what is held back to measure on. Tokens are kept, so that going on does not
    depend on files that changed; whose they are stands in the state, written after them."""
    recipe = given.recipe
    kept, held_kept, state = work / "text.npy", work / "held.npy", work / "state.json"
    if not all(path.exists() for path in (work / "files.json", held_kept, kept, state)):
        files = given.text or recipe.data.text
        tokenizer = Tokenizer.load(model) if files or given.held_out else None
        ids = held = np.empty(0, np.int32)
        if files and tokenizer is not None:
            ids = read_tokens(files, tokenizer, _wanted(recipe))
            cut = min(_HELD_TOKENS, int(len(ids) * _HELD_BACK))
            ids, held = ids[: len(ids) - cut], ids[len(ids) - cut :]
        _check_length(recipe, ids)  # before it is kept, so that the files can be mended
        if given.held_out and tokenizer is not None:
            held = read_tokens(given.held_out, tokenizer, _HELD_TOKENS)
        write_json(work / "files.json", [asdict(record) for record in file_records(files)])
        _save(held_kept, held)
        _save(kept, ids)
    ids, held = np.load(kept, mmap_mode="r"), np.load(held_kept)
    return ids, held


def _files(work: Path) -> list[FileRecord]:
    """The text's files as they were when they were read."""
    return [FileRecord(**record) for record in json.loads((work / "files.json").read_text())]


def _check_length(recipe: Recipe, ids: Ids) -> None:
    """Raises ConfigError for a text that is too short for one of the steps."""
    data = recipe.data
    for step in filter(reads_text, recipe.steps):
        if isinstance(step, Training):
            Windows(ids, step.context, data.seed)
        else:
            spread_windows(ids, data.context, data.samples)


def _wanted(recipe: Recipe) -> int:
    """Tokens worth reading: what training goes through, and several times what calibration takes."""
    data = recipe.data
    need = 8 * data.samples * data.context
    for step in recipe.steps:
        if isinstance(step, Training):
            need = max(need, (step.steps * step.batch * step.accumulate + 2) * step.context)
    return min(data.tokens, int(need / (1 - _HELD_BACK)) + 1)


def _save(path: Path, ids: Ids) -> None:
    aside = path.with_name(f"{path.name}.part.npy")
    np.save(aside, ids)
    os.replace(aside, path)


def _check_state(given: Compression, work: Path, content: str, text: Ids) -> None:
    """Raises ConfigError where the workplace belongs to something else than what is asked for."""
    state = {
        "model": content,
        "recipe": given.recipe.key,
        "text": hashlib.sha256(text.tobytes()).hexdigest(),
        "files": [str(path) for path in given.text or given.recipe.data.text],
        "held-out text": [str(path) for path in given.held_out],
    }
    path = work / "state.json"
    if not path.exists():
        write_json(path, state)
        return
    before = json.loads(path.read_text())
    if differs := [name for name in state if before.get(name) != state[name]]:
        raise ConfigError(
            f"{work} holds the beginning of a compression with another {' and another '.join(differs)}; "
            "remove it to begin anew, or choose another -o"
        )


@contextmanager
def _workplace(work: Path) -> Iterator[Path]:
    """The directory, held so that two runs cannot work in it at once."""
    busy = ConfigError(f"another compression works in {work}; wait for it, or choose another -o")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as cause:
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"cannot work in {work}: {cause.strerror}; choose another -o") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (work / "lock").stat().st_ino != os.fstat(lock.fileno()).st_ino:
                raise busy  # the run that held it removed the directory, and a third one has it
        except (BlockingIOError, FileNotFoundError):
            raise busy from None
        yield work


def _check_out(out: Path) -> None:
    """Raises ConfigError where the result could not take its name."""
    try:
        taken = out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir()))
    except OSError as cause:
        raise ConfigError(f"-o {out} cannot be: {cause.strerror}; choose another") from None
    if taken or out.is_mount():
        raise ConfigError(f"{out} exists already; choose another -o, or remove it")


def _check_disk(given: Compression, expected: Sequence[tuple[str, Estimate]], source: ModelSource) -> None:
    weights = sum(source.info(name).nbytes for name in source.names())
    need = 2 * weights + max(e.disk for _, e in expected)  # a step's model, the next one's, and its scratch
    beside = given.work if given.work.exists() else given.out.parent
    while not beside.exists():
        beside = beside.parent
    free = shutil.disk_usage(beside).free
    if need > free:
        raise ConfigError(
            f"about {need / 1e6:,.1f} MB of disk are needed in {beside}, and {free / 1e6:,.1f} MB are free; "
            "make room, or choose -o on another disk"
        )


def _check_memory(expected: Sequence[tuple[str, Estimate]]) -> None:
    """Refuses what no error of an estimate explains."""
    there = available_memory()
    name, most = max(((name, e.memory) for name, e in expected), key=lambda pair: pair[1])
    if most > _ESTIMATES_ERR * there:
        raise MemoryBudgetError(
            f"the step {name} would take about {most / 1e9:,.1f} GB of memory, and {there / 1e9:,.1f} GB are "
            "there; lower batch or context of its training, or context or samples under [data]"
        )


def _name(step: StepConfig) -> str:
    return " ".join(method_of(step))


def _module(step: StepConfig) -> StepRunner:
    verb, method = method_of(step)
    module: Any = importlib.import_module(f"gossamer.compress.{_MODULES[verb].format(method)}")
    return module  # type: ignore[no-any-return]


def _flops() -> float:
    """Of a float32 product of matrices here and now."""
    x = torch.randn(768, 768)
    best = min(_seconds(lambda: x @ x) for _ in range(5))
    return float(2 * 768**3 / best)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
