"""The steps `recover` and `distil` of a recipe: one trainer, two objectives.

Recovery trains the step's model on the recipe's text, zeros staying zero (Sun et al. 2024 and others do so
after pruning). Distillation trains it to predict what a teacher predicts (Hinton et al. 2015; Muralidharan
et al., Minitron, 2024).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.checkpoint.hub import read_config, resolve_model
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.checkpoint.weights import ModelSource
from gossamer.compress.distill.cache import LogitCache, cache_key, record_bytes
from gossamer.compress.distill.forward import attention_taps, hidden_taps
from gossamer.compress.distill.matching import Matching
from gossamer.compress.distill.objective import Objective
from gossamer.compress.distill.picture import write_losses
from gossamer.compress.distill.student import begin, load_model, student_config, write_model
from gossamer.compress.distill.teacher import LiveTeacher, Teacher
from gossamer.compress.distill.trainer import Trainer
from gossamer.compress.model import check_floats, open_model
from gossamer.compress.step import Estimate, Job, Stopped
from gossamer.compress.text import Windows
from gossamer.config.compression.train import Distil, Recover, Training
from gossamer.errors import ConfigError
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph
from gossamer.graph.weights import Constant

__all__ = ["check_teacher", "estimate", "run"]

_PROBE = "“Naïve” café, 3.14 — the   end.\n\tΩ"  # tells most tokenizers apart


def estimate(config: Recover | Distil, graph: Graph, tokens: int, flops: float) -> Estimate:
    """As StepRunner's. graph: of the step's model, or one of its size; a teacher that is not there yet counts
    as large as it."""
    if isinstance(config, Distil) and config.student is not None:
        student = build_graph(student_config(config.student))
    else:
        student = graph
    size, teacher = _parameters(student), _teacher_parameters(config, graph)
    seen = config.steps * config.accumulate * config.batch * config.context
    # Forward 2, backward 4, forward again 2 for every parameter and token.
    work = seen * (size * (8 if config.checkpointing else 6) + 2 * teacher)
    at_once = config.batch * config.context
    layers = 1 if config.checkpointing else student.layers
    kept = at_once * (layers * student.hidden * 40 + student.layers * student.hidden * 4 + student.vocab * 8)
    disk = 2 * 12 * size
    if isinstance(config, Distil) and config.cache_logits:
        windows = config.steps * config.accumulate * config.batch
        disk += windows * record_bytes(config.context, min(config.cache_logits, graph.vocab), graph.vocab)
    return Estimate(seconds=work / flops, memory=16 * size + 4 * teacher + kept, disk=disk)


def run(config: Recover | Distil, job: Job) -> dict[str, Any]:
    """As StepRunner's: trains job.model on job.text and writes it, with loss.png and losses.json."""
    torch.set_num_threads(job.threads)
    _check_text(job)
    windows = Windows(job.text, config.context, job.seed)
    made = _Distilling(config, job, windows) if isinstance(config, Distil) else _Recovering(config, job)
    trainer = Trainer(made.model, made.objective, windows, config, key=made.key)
    trainer.resume(job.scratch)
    clock = _Clock(trainer, job)
    if not trainer.run(job.scratch, on_step=clock.tell, stop=job.stopping):
        raise Stopped
    size = write_model(trainer.model, made.config, job.model, job.out)
    per_step = config.batch * config.accumulate * config.context
    write_losses(job.out, trainer.losses, per_step)
    last = max(1, config.steps // 20)
    return {
        "steps": config.steps,
        "tokens": config.steps * per_step,
        "epochs": round(config.steps * config.batch * config.accumulate / windows.per_epoch, 3),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "bytes": size,
        "losses": {
            name: {"first": round(series[0], 4), "last": round(float(np.mean(series[-last:])), 4)}
            for name, series in trainer.losses.items()
        },
        "zeros_kept": trainer.zeros.count,
        **made.facts,
    }


def check_teacher(config: Distil, graph: Graph, model: Path) -> None:
    """Raises before the steps ahead take their hours what the step itself would: of a teacher that is nowhere
    or reads other tokens. graph: of the recipe's model; model: its directory."""
    student = graph if config.student is None else build_graph(student_config(config.student))
    directory = model if config.teacher is None else resolve_model(config.teacher)
    _check_teacher(student, open_model(directory)[0], model, directory)


class _Recovering:
    """The step's model, and the text as its only teacher."""

    def __init__(self, config: Recover, job: Job) -> None:
        graph, source = open_model(job.model)
        check_floats(graph, "recovery")
        _check_context(config, graph, "the model")
        self.model = load_model(graph, source)
        self.config = read_config(job.model)
        self.objective = Objective(ce=1.0)
        self.key = cache_key(source.content_key(), job.text, seed=job.seed)
        self.facts: dict[str, Any] = {}


class _Distilling:
    """A student and its teacher."""

    def __init__(self, config: Distil, job: Job, windows: Windows) -> None:
        given, given_source = open_model(job.model)
        directory = job.original if config.teacher is None else resolve_model(config.teacher)
        graph, source = open_model(directory)
        check_floats(given, "distillation")
        if config.student is None:
            self.config = read_config(job.model)
            self.model = load_model(given, given_source)
        else:
            self.config = student_config(config.student)
            self.model = begin(build_graph(self.config), self.config, job.seed)
        student = self.model.graph
        _check_context(config, student, "the student")
        _check_context(config, graph, "the teacher")
        _check_teacher(student, graph, job.model, directory)
        matching = {
            name: (weight, Matching(student, graph, taps(student), taps(graph), job.seed + i))
            for i, (name, weight, taps) in enumerate(
                (("hidden", config.hidden, hidden_taps), ("attention", config.attention, attention_taps))
            )
            if weight
        }
        kind = None if config.loss == "ce" else config.loss
        self.key = cache_key(
            f"{source.content_key()} {given_source.content_key()} {self.config}", job.text, seed=job.seed
        )
        self.objective = Objective(
            ce=config.ce if kind else 1.0 + config.ce,
            kind=kind,
            temperature=config.temperature,
            matching=matching,
            teacher=_teacher(config, job, windows, graph, source, matching) if kind or matching else None,
        )
        self.facts: dict[str, Any] = {
            "teacher": source.content_key(),
            "teacher_parameters": _parameters(graph),
        }


def _teacher(
    config: Distil,
    job: Job,
    windows: Windows,
    graph: Graph,
    source: ModelSource,
    matching: dict[str, tuple[float, Matching]],
) -> Teacher:
    taps = tuple(dict.fromkeys(theirs for _, pairs in matching.values() for _, theirs in pairs.pairs))

    def live() -> Teacher:
        return LiveTeacher(load_model(graph, source), taps, bf16=config.bf16)

    if not config.cache_logits:
        return live()
    settings = {
        name: getattr(config, name) for name in ("context", "batch", "temperature", "cache_logits", "bf16")
    }
    cache = LogitCache(
        job.scratch / "teacher",
        cache_key(source.content_key(), job.text, seed=job.seed, **settings),
        length=config.context,
        kept=config.cache_logits,
        vocab=graph.vocab,
        temperature=config.temperature,
    )
    count = config.steps * config.accumulate * config.batch

    def on_batch(done: int) -> None:
        job.progress("the teacher's logits", done, count)
        job.check_stop()

    cache.fill(live, windows, count, config.batch, on_batch)
    return cache


class _Clock:
    """Tells the job's progress how fast it goes, and how long it will."""

    def __init__(self, trainer: Trainer, job: Job) -> None:
        self._job, self._first, self._began = job, trainer.step, time.monotonic()

    def tell(self, trainer: Trainer) -> None:
        config = trainer.config
        done = trainer.step - self._first
        seconds = (time.monotonic() - self._began) / done
        per_step = config.batch * config.accumulate * config.context
        left = (config.steps - trainer.step) * seconds
        loss = float(np.mean(trainer.losses["loss"][-20:]))
        what = (
            f"training: loss {loss:.3f}, {per_step / seconds:.0f} tokens/s, {math.ceil(left / 60)} min left"
        )
        self._job.progress(what, trainer.step, config.steps)


def _check_text(job: Job) -> None:
    vocab = build_graph(read_config(job.model)).vocab
    if len(job.text) and job.text.max() >= vocab:
        raise ConfigError(
            f"the text has token {job.text.max()}, and the model's vocabulary has {vocab}; the tokenizer "
            "beside the model is another model's"
        )


def _check_context(config: Training, graph: Graph, who: str) -> None:
    if config.context > graph.max_positions:
        raise ConfigError(
            f"context is {config.context}, and {who} was made for {graph.max_positions} positions; lower it"
        )


def _check_teacher(student: Graph, teacher: Graph, mine: Path, theirs: Path) -> None:
    """Raises ConfigError for a teacher that reads other tokens."""
    if student.vocab != teacher.vocab:
        raise ConfigError(
            f"the student has {student.vocab} tokens and the teacher {teacher.vocab}; a teacher needs the "
            "vocabulary of its student"
        )
    if mine != theirs and Tokenizer.load(mine).encode(_PROBE) != Tokenizer.load(theirs).encode(_PROBE):
        raise ConfigError(
            f"the teacher {theirs} cuts text into other tokens than {mine}; a teacher needs the tokenizer of "
            "its student"
        )


def _parameters(graph: Graph) -> int:
    return sum(math.prod(w.shape) for w in graph.weights.values() if not isinstance(w.expr, Constant))


def _teacher_parameters(config: Recover | Distil, graph: Graph) -> int:
    if not isinstance(config, Distil) or (config.loss == "ce" and not (config.hidden or config.attention)):
        return 0
    if config.teacher is None or not Path(config.teacher).expanduser().is_dir():
        return _parameters(graph)
    return _parameters(build_graph(read_config(Path(config.teacher).expanduser())))
