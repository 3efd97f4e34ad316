"""The efficiencies of this machine, Python's part measured with an engine, kept for the next predictions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from gossamer.bench.measure import RecordingExecutor, Step, recording, run_step
from gossamer.config import EngineConfig
from gossamer.engine.request import SamplingParams
from gossamer.planner.calibrate import calibrate
from gossamer.planner.efficiencies import Efficiencies, PythonCosts, measured_file, save_efficiencies
from gossamer.planner.hardware import cache_bytes
from gossamer.planner.history import refit
from gossamer.runtime.start import start
from gossamer.text_engine import TextEngine

__all__ = ["calibrate_machine", "python_costs"]

_BATCHES = (1, 4, 16, 32)
_PROMPT, _OUTPUT = 64, 24


def calibrate_machine(
    isas: Sequence[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> Efficiencies:
    """Measures this machine (about a minute for each instruction set; None: the best one), keeps what it
    found in the cache directory and gives it. What the history taught of older measurements is begun anew.

    Raises ConfigError for an instruction set that this machine lacks.
    """
    found = replace(calibrate(isas, progress=progress), python=python_costs())
    save_efficiencies(found, measured_file())
    refit()
    return found


def python_costs() -> PythonCosts:
    """Microseconds outside of the program, from the embedded model's steps: once as they follow each other, and
    once with the caches emptied before each."""
    config = EngineConfig(
        model="gossamer/pocket", max_num_seqs=max(_BATCHES), max_model_len=256, prefix_cache=None
    )
    engine, recorder = recording(start(config))
    lines, taken = [], []
    submits, prompts = [], []
    for _ in range(3):
        for batch in _BATCHES:
            submit, steps = _run(engine, recorder, batch)
            submits.append(submit / batch)
            decodes = [s for s in steps if s.decode and len(s.contexts) == batch]
            lines.append((1.0, batch))
            taken.append(median(s.wall - s.inside for s in decodes))
            prompts += [s for s in steps if not s.decode]
    step, sequence = np.maximum(np.linalg.lstsq(np.asarray(lines), np.asarray(taken), rcond=None)[0], 1e-7)
    tokens = [
        max(0.0, s.wall - s.inside - step - sequence * len(s.contexts)) / s.tokens
        for s in prompts
        if s.tokens
    ]
    sweep = np.ones(max(8 << 20, 2 * cache_bytes()[1]), np.uint8)
    _, cold = _run(engine, recorder, 1, lambda: int(sweep[::64].sum()))
    outside = median(s.wall - s.inside for s in cold if s.decode)
    return PythonCosts(
        step_us=1e6 * float(step),
        cold_us=max(0.0, 1e6 * (outside - float(step) - float(sequence))),
        sequence_us=1e6 * float(sequence),
        token_us=1e6 * median(tokens),
        request_us=1e6 * median(submits),
    )


def _run(
    engine: TextEngine,
    recorder: RecordingExecutor,
    batch: int,
    between: Callable[[], object] = lambda: None,
) -> tuple[float, list[Step]]:
    """Seconds of submitting a batch, and its steps; between: called before each."""
    params = SamplingParams(temperature=0.0, max_tokens=_OUTPUT, ignore_eos=True)
    began = time.perf_counter()
    for i in range(batch):
        engine.submit(engine.new_id(), tuple((i + j) % 500 + 3 for j in range(_PROMPT)), params)
    submitted = time.perf_counter() - began
    steps = []
    while engine.has_work():
        between()
        step, _ = run_step(engine, recorder)
        if step is not None:
            steps.append(step)
    return submitted, steps
