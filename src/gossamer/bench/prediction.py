"""What was predicted beside what came, of every measured run: compared, shown, and kept in the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from gossamer.bench.throughput import Outcome
from gossamer.bench.workload import Job
from gossamer.errors import GossamerError
from gossamer.memory import anonymous_bytes, available_memory
from gossamer.planner.efficiencies import Efficiencies, current_efficiencies
from gossamer.planner.hardware import Rates, median_rates
from gossamer.planner.history import Run, plain_config, record
from gossamer.planner.memory import plan_memory
from gossamer.planner.model import open_planned
from gossamer.planner.roofline import StepModel
from gossamer.planner.simulate import Simulated, simulate
from gossamer.runtime.start import Started

__all__ = [
    "actual_bytes",
    "check_jobs",
    "compared",
    "keep",
    "predicted_jobs",
    "predicted_latency",
    "probe_spread",
]


def predictable(started: Started) -> bool:
    """Whether the time model covers a configuration: continuous batching on native kernels, without guesses
    (what they bring depends on the text), without a goal that reins steps in, and not the baselines of
    FlashAttention and dynamic shapes."""
    config = started.config
    return (
        config.backend == "cpu"
        and config.continuous_batching is not None
        and config.speculative_decoding is None
        and config.dynamic_batching is None
        and config.flash_attention is not None
        and config.dynamic_shapes is not None
    )


def predicted_latency(
    started: Started,
    rates: Rates,
    *,
    batch: int,
    input_len: int,
    output_len: int,
    efficiencies: Efficiencies | None = None,
) -> dict[str, float]:
    """Metrics of a batch of equal requests; ttft_ms is of the last one, as the benchmark takes it. Empty
    where the model does not cover the configuration."""
    if not predictable(started):
        return {}
    found = _simulated(started, rates, [(input_len, output_len)] * batch, efficiencies)
    first = max(found.firsts)
    predicted = _bytes(started) | {
        "ttft_ms": 1e3 * first,
        "prefill_tokens_per_s": batch * input_len / first,
        "tokens_per_s": found.outputs / found.seconds,
    }
    if found.decodes:
        step = median(found.decodes)
        predicted |= {"itl_ms": 1e3 * step, "decode_tokens_per_s": batch / step}
    return predicted


def predicted_jobs(
    started: Started,
    rates: Rates,
    lengths: Sequence[tuple[int, int]],
    efficiencies: Efficiencies | None = None,
) -> dict[str, float]:
    """Metrics of jobs (prompt and output tokens) that all come at once; ttft_ms and itl_ms are medians. Empty
    where the model does not cover the configuration, or its KV memory is too small for all that may run (then
    sequences are preempted, which it does not know)."""
    longest = sum(sorted((sum(pair) for pair in lengths), reverse=True)[: started.config.max_num_seqs])
    if not predictable(started) or longest > started.memory.kv_tokens:
        return {}
    found = _simulated(started, rates, lengths, efficiencies)
    predicted = _bytes(started) | {
        "ttft_ms": 1e3 * median(found.firsts),
        "tokens_per_s": found.outputs / found.seconds,
    }
    return predicted | ({"itl_ms": 1e3 * median(found.gaps)} if found.gaps else {})


def check_jobs(
    started: Started, rates: Sequence[Rates], jobs: Sequence[Job], outcome: Outcome
) -> dict[str, Any]:
    """Compares a run of jobs that all came at once with its prediction, and keeps both. rates: probes around
    the run. For reports; empty where nothing is predicted."""
    probe = median_rates(rates)
    lengths = [(len(job.prompt), job.output_len) for job in jobs]
    predicted = predicted_jobs(started, probe, lengths)
    if not predicted:
        return {}
    actual: dict[str, float | None] = {
        **actual_bytes(),
        "ttft_ms": 1e3 * median(outcome.ttft),
        "itl_ms": 1e3 * median(outcome.itl) if outcome.itl else None,
        "tokens_per_s": sum(map(len, outcome.tokens)) / outcome.seconds,
    }
    keep(
        "throughput",
        started,
        {
            "requests": len(jobs),
            "prompt_tokens": sum(prompt for prompt, _ in lengths),
            "output_tokens": sum(output for _, output in lengths),
        },
        probe,
        predicted,
        actual,
        cpu_share=outcome.cpu / outcome.seconds / started.threads,
        spread=probe_spread(rates),
    )
    return compared(predicted, actual)


def compared(predicted: Mapping[str, float], actual: Mapping[str, float | None]) -> dict[str, Any]:
    """For reports: both, and predicted / actual - 1 of what both have."""
    both = {name: value for name, value in actual.items() if value and predicted.get(name)}
    return {
        "predicted": {name: round(value, 4) for name, value in predicted.items()},
        "actual": {name: round(value, 4) for name, value in actual.items() if value},
        "errors": {name: round(predicted[name] / value - 1.0, 4) for name, value in both.items()},
    }


def keep(
    kind: str,
    started: Started,
    workload: Mapping[str, Any],
    rates: Rates,
    predicted: Mapping[str, float],
    actual: Mapping[str, float | None],
    *,
    cpu_share: float | None,
    spread: float | None,
) -> bool:
    """Adds a run to this machine's history. False where there is nothing to compare or it cannot be kept."""
    if not predicted:
        return False
    efficiencies = current_efficiencies()
    return record(
        Run(
            kind=kind,
            model=started.config.model,
            stored=StepModel(started.graph, started.config, rates, efficiencies).work.stored,
            config=plain_config(started.config),
            workload=workload,
            rates=asdict(rates),
            predicted=predicted,
            actual={name: value for name, value in actual.items() if value is not None},
            origin=efficiencies.origin,
            corrections=efficiencies.corrections,
            cpu_share=cpu_share,
            probe_spread=spread,
        )
    )


def actual_bytes() -> dict[str, float]:
    """Memory of this process that belongs to no file."""
    return {"total_bytes": float(anonymous_bytes())}


def probe_spread(rates: Sequence[Rates]) -> float:
    """Largest difference between probes, as a part of their median: of the int8 peak and the read rate."""
    spreads = [0.0]
    for name in ("int8_gmacs", "read_gb_s"):
        values = [getattr(r, name) for r in rates]
        spreads.append((max(values) - min(values)) / median(values))
    return max(spreads)


def _simulated(
    started: Started, rates: Rates, jobs: Sequence[tuple[int, int]], efficiencies: Efficiencies | None
) -> Simulated:
    model = StepModel(started.graph, started.config, rates, efficiencies or current_efficiencies())
    return simulate(model, started.config, jobs)


def _bytes(started: Started) -> dict[str, float]:
    """The byte plan with the KV memory that there is: its default depends on what was free."""
    config = replace(started.config, kv_bytes=started.memory.kv, max_model_len=started.max_model_len)
    try:
        model = open_planned(config)
        plan = plan_memory(model, config, 2 * (available_memory() + started.memory.total), kind="command")
    except GossamerError:  # what runs cannot be planned any more: its files are gone, say
        return {}
    return {"total_bytes": float(plan.total)}
