"""Batches without an engine go as an engine's go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gossamer.planner.efficiencies import PythonCosts
from gossamer.planner.roofline import StepModel, predict
from gossamer.planner.simulate import simulate
from gossamer.planner.workload import Workload
from tests.planner.small import RATES, config, efficiencies, graph

STEPS = replace(
    efficiencies(),
    python=PythonCosts(step_us=1e6, cold_us=0.0, sequence_us=0.0, token_us=0.0, request_us=0.0),
)


def steps(jobs: list[tuple[int, int]], **limits: int) -> float:
    given = config(**limits)
    return simulate(StepModel(graph(), given, RATES, STEPS), given, jobs).seconds


def test_steps_are_those_of_the_scheduler() -> None:
    assert steps([(10, 5)]) == pytest.approx(5, rel=1e-2)  # the prompt's step gives the first token
    assert steps([(10, 5)] * 4, max_num_seqs=4) == pytest.approx(5, rel=1e-2)
    assert steps([(10, 5)] * 4, max_num_seqs=2) == pytest.approx(10, rel=1e-2)
    assert steps([(100, 1)], max_num_seqs=1, max_num_batched_tokens=32) == pytest.approx(4, rel=1e-2)
    # The second prompt begins in the first's step, and ends beside its decode.
    assert steps([(24, 3)] * 2, max_num_seqs=2, max_num_batched_tokens=32) == pytest.approx(4, rel=1e-2)


def test_outputs_and_first_tokens_are_counted() -> None:
    given = config(max_num_seqs=2)
    found = simulate(StepModel(graph(), given, RATES, STEPS), given, [(8, 4), (8, 2), (8, 3)])
    assert found.outputs == 9
    assert found.firsts[0] == found.firsts[1] < found.firsts[2]
    assert len(found.gaps) == 9 - 3


def test_the_closed_form_is_near_the_simulation() -> None:
    given = config(max_num_seqs=4, max_num_batched_tokens=64)
    python = PythonCosts(step_us=100.0, cold_us=0.0, sequence_us=20.0, token_us=1.0, request_us=50.0)
    known = replace(efficiencies(), python=python)
    lengths = [(48 + i % 5 * 8, 40 + i % 7 * 8) for i in range(60)]
    found = simulate(StepModel(graph(), given, RATES, known), given, lengths)
    mean = [round(sum(pair[i] for pair in lengths) / len(lengths)) for i in (0, 1)]
    work = Workload(prompt_tokens=mean[0], output_tokens=mean[1], concurrency=4)
    told = predict(graph(), given, work, RATES, known)
    assert told.tokens_per_s == pytest.approx(found.outputs / found.seconds, rel=0.05)
