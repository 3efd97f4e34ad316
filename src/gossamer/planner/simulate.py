"""A continuous batch, step by step as the engine's scheduler goes, with the time model in the engine's place.

It follows engine/batching/continuous.py without pages: decodes first, then the prompts of those running, then
newcomers, within max_num_batched_tokens and max_num_seqs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.config import EngineConfig
from gossamer.planner.roofline import StepModel, prefill_chunk

__all__ = ["Simulated", "simulate"]

_LEAST_CHUNK = 16  # engine/batching/continuous.py: what prompts get of a step at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """seconds: from the start to the last token, with steps as uneven as they are; firsts: of each job, when
    its first token came, seconds from the start; gaps: seconds of the steps between tokens, each counted once
    for every sequence that waited; decodes: those of steps in which all places decode; outputs: tokens in
    all."""

    seconds: float
    firsts: tuple[float, ...]
    gaps: tuple[float, ...]
    decodes: tuple[float, ...]
    outputs: int


@dataclass(slots=True)
class _Sequence:
    job: int
    prompt: int
    left: int
    computed: int = 0
    length: int = 0


def simulate(model: StepModel, config: EngineConfig, jobs: Sequence[tuple[int, int]]) -> Simulated:
    """Jobs (prompt tokens, output tokens) that all come at once."""
    waiting = deque(_Sequence(i, prompt, output, length=prompt) for i, (prompt, output) in enumerate(jobs))
    running: list[_Sequence] = []
    most = min(config.max_num_seqs, len(jobs))
    chunk = prefill_chunk(config)
    now = model.request_seconds() * len(jobs)
    firsts = [0.0] * len(jobs)
    gaps: list[float] = []
    decodes: list[float] = []
    while waiting or running:
        decoding = [s for s in running if s.computed >= s.prompt]
        prefilling = [s for s in running if s.computed < s.prompt]
        budget = config.max_num_batched_tokens - len(decoding)
        if prefilling or not decoding:
            budget = max(budget, min(_LEAST_CHUNK, config.max_num_batched_tokens))
        while waiting and len(running) < most and budget > sum(s.prompt - s.computed for s in prefilling):
            running.append(waiting.popleft())
            prefilling.append(running[-1])
        spans, rows = [], len(decoding)
        if decoding:
            context = sum(s.length for s in decoding) // len(decoding)
            spans.append((len(decoding), context, 1))
        ended = []
        for s in prefilling:
            take = min(budget, chunk, s.prompt - s.computed)
            if take < 1:
                break
            spans.append((1, s.computed, take))
            budget -= take
            s.computed += take
            if s.computed == s.prompt:
                rows += 1
                ended.append(s)
        step = model.seconds(spans, rows)
        now += step
        gaps += [step] * len(decoding)
        if len(decoding) == most:
            decodes.append(step)
        for s in ended:
            firsts[s.job] = now
        for s in decoding + ended:
            s.length += 1
            s.left -= 1
        running = [s for s in running if s.left > 0]
    return Simulated(
        seconds=now * model.efficiencies.unevenness,
        firsts=tuple(firsts),
        gaps=tuple(gaps),
        decodes=tuple(decodes),
        outputs=sum(output for _, output in jobs),
    )
