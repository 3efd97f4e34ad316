"""What dynamic shapes gain: the same requests run as they are, and padded to the maximum shape in every step.

Padded is what a runtime of one fixed shape computes (runtime/padded.py). Both ways share one program and its
memory, and take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from gossamer.backends.cpu.program import native_arena
from gossamer.bench.measure import RecordingExecutor, run_step
from gossamer.bench.memory import memory_figures
from gossamer.bench.workload import Job, uncached
from gossamer.config import EngineConfig
from gossamer.engine.request import SamplingParams
from gossamer.engine.step import Executor
from gossamer.errors import ConfigError
from gossamer.runtime.padded import PaddedExecutor
from gossamer.runtime.start import Started, start
from gossamer.text_engine import TextEngine

__all__ = ["Shapes", "bench_shapes", "start_shapes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """A started program with both ways to feed it. config: as the user gave it."""

    config: EngineConfig
    started: Started
    dynamic: Executor
    padded: Executor

    def __post_init__(self) -> None:
        assert self.dynamic.limits == self.padded.limits


def start_shapes(config: EngineConfig, loading: Callable[[int, int], None] | None = None) -> Shapes:
    """Loads the model with room for the padding's sequences and pages. Raises ConfigError for what is not
    measured."""
    if config.backend != "cpu":
        raise ConfigError(f"shapes are measured on native kernels; --backend {config.backend} has none")
    if config.static_batching is not None or config.paged_attention is None:
        raise ConfigError("shapes are measured with continuous batching over pages; drop the baseline flags")
    if config.max_model_len == 1:
        raise ConfigError("--max-model-len 1 has no room for a prompt and a token after it; give 2 at least")
    if config.dynamic_shapes is None:
        raise ConfigError("shapes are measured with and without padding; leave out --no-dynamic-shapes")
    config = uncached(config)
    started = start(replace(config, dynamic_shapes=None), loading)
    assert isinstance(started.executor, PaddedExecutor)
    return Shapes(
        config=config,
        started=started,
        dynamic=started.executor.unfilled(),
        padded=started.executor,
    )


def bench_shapes(
    shapes: Shapes, jobs: Sequence[Job], rounds: int, *, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The report that `gossamer bench shapes --json` prints: medians over rounds, and over all their steps.

    arena_bytes: what the intermediates of one step take at the median number of tokens that ran, under
    the arena's own plan; planned_arena_bytes: of the maximum, which is allocated in either case.
    """
    done: dict[str, list[_Round]] = {"dynamic": [], "padded": []}
    for index in range(rounds + 1):
        for name, executor in (("dynamic", shapes.dynamic), ("padded", shapes.padded)):
            progress(f"{'warm-up' if index == 0 else f'round {index} of {rounds}'}, {name}")
            took = _run(shapes, executor, jobs if index else [replace(jobs[0], output_len=2)])
            if index:
                done[name].append(took)
    graph, most = shapes.started.graph, shapes.config
    most_rows = shapes.padded.limits.max_rows
    report: dict[str, Any] = {}
    for name, found in done.items():
        tokens = [n for r in found for n in r.tokens]
        rows = [n for r in found for n in r.rows]
        if name == "padded":
            tokens, rows = [most.max_num_batched_tokens] * len(tokens), [most_rows] * len(rows)
        counts = {"T": round(median(tokens)), "R": round(median(rows)), "S": most.max_num_seqs}
        report[name] = {
            "step_ms_median": round(median(s for r in found for s in r.steps) * 1e3, 4),
            "output_tokens_per_s": round(median(r.outputs / r.seconds for r in found), 3),
            "total_s": round(median(r.seconds for r in found), 4),
            "steps": len(found[0].steps),
            "tokens_per_step_median": counts["T"],
            "arena_bytes": native_arena(
                graph,
                counts,
                reuse=most.memory_reuse is not None,
                unit_rows=None if most.layer_fusion is None else most.layer_fusion.rows,
            ).bytes,
        }
    same = len({r.ids for found in done.values() for r in found}) == 1
    return report | {
        "speedup": round(report["padded"]["total_s"] / report["dynamic"]["total_s"], 3),
        "same_tokens": same,
        "planned_arena_bytes": shapes.started.memory.arena,
        "max_num_batched_tokens": most.max_num_batched_tokens,
        "max_num_seqs": most.max_num_seqs,
        "requests": len(jobs),
        "rounds": rounds,
        "memory": memory_figures(shapes.started.memory),
    }


@dataclass(frozen=True, slots=True)
class _Round:
    """seconds: of it all; steps: of each; tokens, rows: real ones in each; ids: what every job produced."""

    seconds: float
    steps: tuple[float, ...]
    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    outputs: int
    ids: tuple[tuple[int, ...], ...]


def _run(shapes: Shapes, executor: Executor, jobs: Sequence[Job]) -> _Round:
    recorder = RecordingExecutor(executor)
    engine = TextEngine(replace(shapes.started, config=shapes.config, executor=recorder))
    names = []
    for job in jobs:
        names.append(engine.new_id())
        params = SamplingParams(temperature=0.0, max_tokens=job.output_len, ignore_eos=True)
        engine.submit(names[-1], job.prompt, params)
    ids: dict[str, list[int]] = {name: [] for name in names}
    steps, rows = [], []
    while engine.has_work():
        step, updates = run_step(engine, recorder)
        for update in updates:
            ids[update.request_id] += update.tokens
        if step is not None:
            steps.append(step)
            rows.append(sum(len(update.tokens) for update in updates))
    return _Round(
        seconds=sum(step.wall for step in steps),
        steps=tuple(step.wall for step in steps),
        tokens=tuple(step.tokens for step in steps),
        rows=tuple(rows),
        outputs=sum(map(len, ids.values())),
        ids=tuple(tuple(ids[name]) for name in names),
    )
