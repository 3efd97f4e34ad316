"""The life of an ablation: arms one after the other, their rounds interleaved, rows as they are done.

Memory and quality are the given model's; speed is that of a shape. Every engine runs in a process of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from gossamer.backends.cpu.formats import kv_page_bytes
from gossamer.bench.ablation.arms import (
    LIMITS,
    NAMES,
    Arm,
    Setting,
    alone,
    base,
    cumulative,
    further,
    typed,
    without,
)
from gossamer.bench.ablation.mix import LONG, SLOW, STACKED, USUAL, Measured
from gossamer.bench.ablation.offline import make_pruned, make_student, split_texts
from gossamer.bench.ablation.proof import Evidence, prove
from gossamer.bench.ablation.quality import Qualities, Score, quality_effects, quality_figures
from gossamer.bench.ablation.request import Now, Request, Watch
from gossamer.bench.ablation.shapes import OWN, write_shape
from gossamer.bench.ablation.sides import Pool, Worker, WorkerError
from gossamer.bench.ablation.verdict import SMALLEST, effect, exact, figure
from gossamer.bench.ablation.worker import Keep, State
from gossamer.bench.ledger import Effect, Figure, Ledger, Proof, Row, Side
from gossamer.bench.prediction import probe_spread
from gossamer.checkpoint.hub import POCKET, POCKET_HALF, read_config, resolve_model
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError, GossamerError
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph
from gossamer.planner.hardware import Prober, Rates, hardware, median_rates

__all__ = ["ablate"]

SPEED = ("ttft_ms", "itl_ms", "tokens_per_s")
_LEAST_ROUNDS = 3
_STUDENTS = {POCKET: POCKET_HALF}
_GOAL = 2.0  # times what a step takes that decodes a few sequences: what dynamic batching is to hold


def ablate(request: Request, watch: Watch | None = None) -> Ledger:
    """Measures and gives the ledger. Ctrl-C ends it early: the ledger then holds what was measured, and
    settings["interrupted"] says so.

    Raises GossamerError for a model that cannot be read; what one technique cannot do stands in its row.
    """
    with tempfile.TemporaryDirectory(prefix="gossamer-ablate-") as folder, Pool() as pool:
        return _Ablation(request, watch or Watch(), pool, Path(folder)).run()


class _Ablation:
    def __init__(self, request: Request, watch: Watch, pool: Pool, folder: Path) -> None:
        self._request, self._watch, self._pool = request, watch, pool
        self._own = _read(request.model)
        self._length = min(int(LIMITS["max_model_len"]), self._own.max_positions)
        if self._length < SLOW.longest:
            raise ConfigError(
                f"the context of {request.model} is {self._length} tokens, and the least that is measured "
                f"takes {SLOW.longest}"
            )
        own = request.speed_shape == OWN
        self._shape_dir = None if own else str(write_shape(request.speed_shape, folder))
        self._shape = self._own if self._shape_dir is None else _read(self._shape_dir)
        self._train, texts = split_texts(request.texts) if request.make else ([], list(request.texts))
        self._qualities = Qualities(request.model, texts, request.tokens)
        self._folder = folder
        self._notes: dict[str, str] = {}
        self._done = self._arms = 0
        self._rows: list[Row] = []
        self._probes: list[Rates] = []
        self._kept, self._unkept = 0, list[str]()
        self._ran: list[tuple[Worker, Arm, list[Measured]]] = []
        self._memories: dict[EngineConfig, dict[str, float]] = {}
        self._cpu: list[float] = []
        self._began = time.monotonic()

    def run(self) -> Ledger:
        began = datetime.now(UTC).isoformat(timespec="seconds")
        prober = Prober()
        self._probes, interrupted = [prober.measure()], False
        try:
            arms = self._plan()
            self._arms = len(arms)
            if all(self._why_not(arm) for arm in arms):
                why = self._why_not(arms[0])
                raise ConfigError(f"nothing that was asked for can be measured: {arms[0].technique}: {why}")
            for arm in arms:
                self._rows.append(self._row(arm))
                self._probes.append(prober.measure())
                self._predictions()
                self._done += 1
                self._watch.row(self._rows[-1])
        except KeyboardInterrupt:
            interrupted = True
        self._pool.clear()
        return self._ledger(began, self._probes, interrupted)

    def _plan(self) -> list[Arm]:
        """All arms, in the order in which they share engines best. A goal for dynamic batching takes a look
        at the machine first."""
        request = self._request
        names = request.techniques or NAMES
        arms: list[Arm] = []
        if "alone" in request.modes:
            goal, gap = self._goal() if "dynamic_batching" in names else (50.0, 0.0)
            student, pruned = self._made(names)
            arms += alone(names, goal_ms=goal, gap_ms=gap, student=student, pruned=pruned)
            if request.seconds is None:
                arms += further(names, student=student, pruned=pruned)
        if "cumulative" in request.modes:
            arms += cumulative(names)
        if "without" in request.modes:
            arms += without(names)
        return arms

    def _made(self, names: Sequence[str]) -> tuple[str | None, str | None]:
        """The student and the pruned model: shipped, or made where that was asked for. What cannot be made
        is told by the model's own steps, and the technique is measured without."""
        request = self._request
        found: dict[str, str | None] = {"distillation": _STUDENTS.get(request.model), "pruning": None}
        makers = {"distillation": make_student, "pruning": make_pruned}
        for name, make in makers.items():
            if not request.make or found[name] is not None or name not in names:
                continue
            arm = Arm(technique=name, mode="alone")

            def progress(what: str, done: int, total: int, arm: Arm = arm) -> None:
                self._say(arm, f"making a model: {what}, {done} of {total}")

            try:
                found[name] = str(make(request.model, self._train, self._folder, progress))
            except GossamerError as error:
                self._notes[name] = f"none could be made: {error}"
        return found["distillation"], found["pruning"]

    def _goal(self) -> tuple[float, float]:
        """Milliseconds between tokens that leave a decode step some room for prompts, and between requests
        that keep the engine busy."""
        self._say(Arm(technique="dynamic_batching", mode="alone"), "what a step takes")
        try:
            worker = self._pool.get(self._config(Setting(name=""), speed=True))
            worker.run(SLOW, 0)
            found = worker.run(USUAL, 0)
            gap = 1e3 * found.mix_seconds / len(USUAL.lengths)
            return max(1.0, round(_GOAL * found.itl_ms, 1)), gap
        except (GossamerError, WorkerError):  # its arm will say what is wrong
            return 50.0, 0.0

    def _config(self, setting: Setting, *, speed: bool) -> EngineConfig:
        """A setting on the model or on the speed's shape."""
        shaped = speed and self._shape_dir is not None
        graph = self._shape if shaped else self._own
        fields = dict(setting.fields)
        if speed:
            fields |= setting.limits
        if shaped:
            fields["load_format"] = "dummy"
        model = self._shape_dir if shaped else setting.model or self._request.model
        assert model is not None
        fields.setdefault("max_model_len", LIMITS["max_model_len"] if shaped else self._length)
        config = base(model, **fields)
        room = setting.roomy_tokens if not speed and setting.roomy_tokens is not None else setting.kv_tokens
        if room is None:
            return config
        room = max(room, -(-fields["max_model_len"] // 16) * 16)
        return replace(config, kv_bytes=room // 16 * kv_page_bytes(graph, 16, config.kv_dtype))

    def _row(self, arm: Arm) -> Row:
        said = self._notes.get(arm.technique)
        if said is not None:
            arm = replace(arm, note=f"{arm.note}; {said}")
        off, on, why = arm.off, arm.on, self._why_not(arm)
        if off is None or on is None or why:
            return Row(technique=arm.technique, mode=arm.mode, off=None, on=None, note=why or arm.note)
        try:
            return self._measured(arm, off, on)
        except (GossamerError, WorkerError) as error:
            note = "error: " + " ".join(str(error).split())
            return Row(technique=arm.technique, mode=arm.mode, off=None, on=None, note=note)

    def _why_not(self, arm: Arm) -> str:
        """Why an arm cannot be measured; "" where it can."""
        if arm.off is None or arm.on is None:
            return arm.note
        if (arm.own or self._shape_dir is None) and arm.work.longest > self._length:
            longest = arm.work.longest
            return f"not measured: its requests have up to {longest} tokens, the context {self._length}"
        if arm.shaped and self._shape_dir is None:
            return "not measured: random weights take a shape; drop --speed-shape own"
        return ""

    def _measured(self, arm: Arm, off: Setting, on: Setting) -> Row:
        until = self._until()
        own, shape = arm.own or self._shape_dir is None, self._request.speed_shape
        label = "" if own else shape
        effects: list[Effect] = []
        figures: tuple[dict[str, Figure], dict[str, Figure]] = ({}, {})
        # A technique that only a shape shows has its memory from there.
        memory = self._memory(arm, off, on, speed=arm.shaped)
        for metric in memory[0]:
            a, b = (side[metric] for side in memory)
            for each, value in zip(figures, (a, b), strict=True):
                each[metric] = figure([value])
            effects.append(exact(metric, a, b, label if arm.shaped else ""))
        evidence = self._speed(arm, off, on, until)
        runs = [side.runs for side in evidence]
        for metric in SPEED:
            before, after = ([float(getattr(run, metric)) for run in side] for side in runs)
            for each, values in zip(figures, (before, after), strict=True):
                each[metric] = figure(values)
            effects.append(effect(metric, before, after, label))
        notes = [arm.note] if arm.note else []
        if arm.quality and self._qualities:
            scores = self._quality(arm, off, on)
            for each, score in zip(figures, scores, strict=True):
                each |= quality_figures(score)
            effects += quality_effects(*scores)
        elif arm.quality:
            notes.append("quality: not measured; --text FILE, a text the model never saw, measures it")
        proof, missing = prove(arm.technique, *evidence)
        if missing:
            notes.insert(0, f"error: nothing shows that it ran: {missing}")
            effects = []
        self._cpu += [run.cpu for side in runs for run in side]
        sides = [
            Side(name=setting.name, config=typed(each.config), figures=found)
            for setting, each, found in zip((off, on), evidence, figures, strict=True)
        ]
        return Row(
            technique=arm.technique,
            mode=arm.mode,
            off=sides[0],
            on=sides[1],
            effects=tuple(effects),
            proof=proof if not missing else Proof(),
            note="; ".join(notes),
        )

    def _predictions(self) -> None:
        """Holds the arm's lone requests against what the planner says of them. Not those that others run
        beside, nor answers that are guessed."""
        around = self._probes[-2:]
        for worker, arm, runs in self._ran:
            if arm.work.latency != "lone" or arm.work.quotes:
                continue
            kept = Keep(
                work=arm.work,
                rates=median_rates(around),
                spread=probe_spread(around),
                ttft_ms=median(run.ttft_ms for run in runs),
                itl_ms=median(run.itl_ms for run in runs),
                cpu_share=median(run.cpu for run in runs),
            )
            try:
                self._kept += worker.keep(kept)
            except (GossamerError, WorkerError) as error:  # what was measured stands all the same
                self._unkept.append(f"{arm.technique} {arm.mode}: {error}")
        self._ran = []

    def _until(self) -> float:
        """When an arm that begins now has to end its rounds."""
        now, most = time.monotonic(), self._request.arm_seconds
        if self._request.seconds is not None:
            left = self._began + self._request.seconds - now
            most = min(most, max(0.0, left) / max(1, self._arms - self._done))
        return now + most

    def _memory(self, arm: Arm, off: Setting, on: Setting, *, speed: bool) -> list[dict[str, float]]:
        """Bytes of both sides, after some work."""
        found = []
        for setting in (off, on):
            config = self._config(setting, speed=speed)
            if config not in self._memories:
                self._say(arm, f"memory of {setting.name}")
                worker = self._pool.once(config)
                try:
                    worker.run(SLOW, 0)
                    self._memories[config] = _bytes(worker.state)
                finally:
                    worker.close()
            found.append(self._memories[config])
        return found

    def _speed(self, arm: Arm, off: Setting, on: Setting, until: float) -> tuple[Evidence, Evidence]:
        """Rounds of both sides in turns: off, on, on, off, ..."""
        speed = not arm.own
        workers: list[Worker] = []
        for setting in (off, on):
            self._say(arm, f"starting {setting.name}")
            beside = workers[0] if workers else None
            workers.append(self._pool.get(self._config(setting, speed=speed), beside=beside))
        before = [worker.state for worker in workers]
        for worker in workers:
            self._run(worker, arm, SLOW if arm.work is not SLOW else replace(SLOW, lone=(4, 2)), 0)
        runs: tuple[list[Measured], list[Measured]] = ([], [])
        index, took = 0, 0.0
        while index < self._request.rounds:
            if index >= min(_LEAST_ROUNDS, self._request.rounds) and time.monotonic() + took > until:
                break
            began = time.monotonic()
            for side in (0, 1) if index % 2 == 0 else (1, 0):
                self._say(arm, f"round {index + 1}, {(off, on)[side].name}", runs)
                runs[side].append(self._run(workers[side], arm, arm.work, 1000 * (index + 1)))
            index, took = index + 1, time.monotonic() - began
        self._ran = [(worker, arm, found) for worker, found in zip(workers, runs, strict=True)]
        first, second = (
            Evidence(config=w.config, before=b, after=w.state, runs=r)
            for w, b, r in zip(workers, before, runs, strict=True)
        )
        return first, second

    def _run(self, worker: Worker, arm: Arm, work: Any, seed: int) -> Measured:
        try:
            return worker.run(work, seed)
        except BaseException:  # an interrupted one is in the middle of a reply
            self._pool.discard(worker)
            raise

    def _quality(self, arm: Arm, off: Setting, on: Setting) -> list[Score]:
        def progress(what: str, done: int, total: int) -> None:
            self._say(arm, f"quality: {what}, {done} of {total}")

        return [self._qualities.score(self._config(each, speed=False), progress) for each in (off, on)]

    def _say(self, arm: Arm, what: str, runs: Sequence[Sequence[Measured]] = ()) -> None:
        medians = {}
        if runs and all(runs):
            for metric in SPEED:
                a, b = (median(getattr(run, metric) for run in side) for side in runs)
                medians[metric] = (a, b)
        self._watch.now(
            Now(
                technique=arm.technique,
                mode=arm.mode,
                what=what,
                done=self._done,
                arms=self._arms,
                medians=medians,
            )
        )

    def _ledger(self, began: str, rates: list[Rates], interrupted: bool) -> Ledger:
        request = self._request
        reads = [r.read_gb_s for r in rates]
        return Ledger(
            model=request.model,
            speed_shape=request.speed_shape,
            machine=asdict(hardware()),
            rates=asdict(median_rates(rates)),
            began=began,
            seconds=round(time.monotonic() - self._began, 1),
            rounds=request.rounds,
            settings={
                "techniques": list(request.techniques or NAMES),
                "modes": list(request.modes),
                "texts": [text.name for text in request.texts],
                "quality_tokens": request.tokens if request.texts else 0,
                "seconds_limit": request.seconds,
                "smallest_effect": SMALLEST,
                "cpu_share": round(median(self._cpu), 3) if self._cpu else None,
                "probe_moved": round(max(reads) / min(reads), 3),
                "interrupted": interrupted,
                "predictions_kept": self._kept,
                "predictions_failed": self._unkept,
                "work": {name: asdict(work) for name, work in _WORKS.items()},
            },
            rows=tuple(self._rows),
            versions=_versions(),
        )


def _bytes(state: State) -> dict[str, float]:
    """Memory of an engine by purpose, and all that its process holds."""
    memory = state.memory
    return {
        "weights_bytes": float(memory.weights + memory.draft),
        "kv_bytes": float(memory.kv),
        "arena_bytes": float(memory.arena + memory.workspace),
        "resident_bytes": float(state.resident),
    }


_WORKS = {"usual": USUAL, "long": LONG, "slow": SLOW, "stacked": STACKED}


def _read(model: str) -> Graph:
    config = base(model)
    return build_graph(read_config(resolve_model(model)), name=config.model)


def _versions() -> dict[str, str]:
    import platform

    import numpy

    from gossamer import __version__

    return {"gossamer": __version__, "python": platform.python_version(), "numpy": numpy.__version__}
