"""Latency: a batch of equal requests run to its end, several times, held against the probed limits.

Fractions: of the probed read bandwidth in decode (packed weight bytes touched and KV bytes read, over the
step's time), of the probed int8 peak in prefill and decode (MACs of linear layers needed, the head on
sampled rows only). Times run from submit to the token, Python included.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, get_args

from gossamer.bench.measure import RecordingExecutor, Step, recording, run_step
from gossamer.bench.memory import memory_figures
from gossamer.bench.prediction import actual_bytes, compared, keep, predicted_latency, probe_spread
from gossamer.config import EngineConfig
from gossamer.config.quantization import WeightFormat
from gossamer.engine.request import SamplingParams
from gossamer.errors import ConfigError
from gossamer.passes.weight_formats import matrices
from gossamer.planner.costs import StepCosts, step_costs
from gossamer.planner.hardware import Prober, Rates, cache_bytes, median_rates
from gossamer.runtime.start import start
from gossamer.text_engine import TextEngine

__all__ = ["LatencyWorkload", "bench_latency", "fractions"]

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyWorkload:
    """batch_size sequences of input_len random prompt tokens and output_len greedy ones."""

    input_len: int
    output_len: int
    batch_size: int
    runs: int = 3
    warmups: int = 1

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "batch_size", "runs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """prefill: seconds from submit to the last first token, mixed: tokens sampled until then;
    decode: seconds from there to the end, in which decode_tokens came; cpu: processor seconds of it all."""

    prefill: float
    mixed: int
    decode: float
    decode_tokens: int
    cpu: float
    steps: tuple[Step, ...]


def bench_latency(
    config: EngineConfig,
    work: LatencyWorkload,
    *,
    on_start: Callable[[TextEngine], None] | None = None,
    loading: Callable[[int, int], None] | None = None,
    progress: Progress = lambda text: None,
    prober: Callable[[str | None, int], Prober] = Prober,
) -> dict[str, Any]:
    """The report, with the keys that `gossamer bench latency --json` prints.

    `errors` lists fractions above 1: they are wrong measurements (a model inside the caches, a machine
    whose speed moved). cpu_share: processor time over wall time and threads; well below 1, others were
    served meanwhile. prediction: what was expected, what came, and how far off that was; both are kept in the
    history of this machine. prober: makes what measures the limits. Raises GossamerError for what a user can
    mend.
    """
    began = time.perf_counter()
    started = start(config, loading)
    load_s = time.perf_counter() - began
    engine, recorder = recording(started)
    if on_start is not None:
        on_start(engine)
    isa = started.isa if started.isa in ("scalar", "avx2", "avx512") else None
    limits = prober(isa, started.threads)
    costs = step_costs(started.graph, config.kv_dtype)
    rng = random.Random(0)

    def once() -> _Run:
        prompts = [
            tuple(rng.randrange(started.graph.vocab) for _ in range(work.input_len))
            for _ in range(work.batch_size)
        ]
        return _run(engine, recorder, prompts, work.output_len)

    for i in range(work.warmups):
        progress(f"warm-up {i + 1} of {work.warmups}")
        once()
    rates, runs = [limits.measure()], []
    for i in range(work.runs):
        progress(f"run {i + 1} of {work.runs}")
        runs.append(once())
        rates.append(limits.measure())
    probe = median_rates(rates)
    stored = matrices(started.graph).values()
    integer = all(weight.format in {*get_args(WeightFormat)} - {"fp8"} for weight in stored)
    report = _report(work, runs, costs, probe, caches=cache_bytes(), integer=integer)
    predicted = predicted_latency(
        started, probe, batch=work.batch_size, input_len=work.input_len, output_len=work.output_len
    )
    first, step = median(run.prefill for run in runs), report["step_ms_median"]
    actual = actual_bytes() | {
        "ttft_ms": first * 1e3,
        "itl_ms": step,
        "prefill_tokens_per_s": work.batch_size * work.input_len / first,
        "decode_tokens_per_s": work.batch_size / step * 1e3 if step else None,
        "tokens_per_s": median(
            work.batch_size * work.output_len / (run.prefill + run.decode) for run in runs
        ),
    }
    keep(
        "latency",
        started,
        {"input_len": work.input_len, "output_len": work.output_len, "batch_size": work.batch_size},
        probe,
        predicted,
        actual,
        cpu_share=report["cpu_share"],
        spread=probe_spread(rates),
    )
    return report | {
        "prediction": compared(predicted, actual),
        "probe_spread": round(probe_spread(rates), 4),
        "memory": memory_figures(started.memory),
        "probe": asdict(probe),
        "load_s": round(load_s, 3),
        "input_len": work.input_len,
        "output_len": work.output_len,
        "batch_size": work.batch_size,
    }


def _run(
    engine: TextEngine, recorder: RecordingExecutor, prompts: list[tuple[int, ...]], output_len: int
) -> _Run:
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    firsts: dict[str, float] = {}
    mixed = 0
    done: list[Step] = []
    began, cpu = time.perf_counter(), time.process_time()
    for prompt in prompts:
        engine.submit(engine.new_id(), prompt, params)
    while engine.has_work():
        step, updates = run_step(engine, recorder)
        if len(firsts) < len(prompts):
            mixed += sum(len(u.tokens) for u in updates)
        for update in updates:
            if "first_token" in update.times:
                firsts.setdefault(update.request_id, update.times["first_token"])
        if step is not None:
            done.append(step)
    ended = time.perf_counter()
    last_first = max(firsts.values())
    return _Run(
        prefill=last_first - began,
        mixed=mixed,
        decode=ended - last_first,
        decode_tokens=len(prompts) * output_len - mixed,
        cpu=time.process_time() - cpu,
        steps=tuple(done),
    )


def _report(
    work: LatencyWorkload,
    runs: list[_Run],
    costs: StepCosts,
    probe: Rates,
    *,
    caches: tuple[int, int],
    integer: bool,
) -> dict[str, Any]:
    lines = []
    for run in runs:
        # Only steps in which the whole batch decodes: those before and after are smaller.
        decodes = [s for s in run.steps if s.decode and len(s.contexts) == work.batch_size]
        lines.append(
            {
                "prefill_s": run.prefill,
                "decode_s": run.decode,
                "cpu_share": run.cpu / (run.prefill + run.decode) / probe.threads,
                "prefill_tokens_per_s": work.batch_size * work.input_len / run.prefill,
                "decode_tokens_per_s": run.decode_tokens / run.decode if run.decode_tokens else None,
                "step_ms_median": median(s.wall for s in decodes) * 1e3 if decodes else None,
                **fractions(
                    work, run.prefill, run.mixed, decodes, costs, probe, caches=caches, integer=integer
                ),
            }
        )
    medians = {
        name: _median([line[name] for line in lines])
        for name in lines[0]
        if name not in ("prefill_s", "decode_s")
    }
    errors = [
        f"{name} is {value:.2f}: more than the probed limit, so the measurement is wrong "
        f"(weights inside the caches, or a machine shared with others: its processors gave us "
        f"{100 * (medians['cpu_share'] or 0):.0f} % of their time)"
        for name, value in medians.items()
        if "fraction" in name and value is not None and value > 1
    ]
    if medians["step_ms_median"] is None and work.output_len > 1:
        errors.append(
            f"no step decoded all {work.batch_size} sequences together, so there is none to measure; "
            "give a longer --output-len or more KV memory"
        )
    return medians | {"runs": [{k: _rounded(v) for k, v in line.items()} for line in lines], "errors": errors}


def fractions(
    work: LatencyWorkload,
    prefill: float,
    mixed: int,
    decodes: list[Step],
    costs: StepCosts,
    probe: Rates,
    *,
    caches: tuple[int, int],
    integer: bool,
) -> dict[str, float | None]:
    """Parts of the probed limits that one run reached; None where it had no step of the kind.

    prefill: seconds to the last first token; mixed: tokens sampled until then, of which all but one for
    each sequence were decoded beside the prefill. caches: bytes that the cores' own caches hold, and the last
    one; steps that read less than the first never see the memory and have no fraction of its bandwidth, nor
    have those that fit into the last and were faster than the memory is. integer: all weights
    are integers, for which the bf16 peak is no limit.
    """
    extra = mixed - work.batch_size
    needed = costs.macs(work.batch_size * work.input_len + extra, mixed)
    found: dict[str, float | None] = {
        "prefill_fraction_of_int8_peak": needed / prefill / (probe.int8_gmacs * 1e9),
        "prefill_fraction_of_bf16_peak": None if integer else needed / prefill / (probe.bf16_gmacs * 1e9),
        "decode_bytes": None,
        "decode_fraction_of_bandwidth": None,
        "decode_fraction_of_int8_peak": None,
        "overhead_fraction": None,
    }
    if decodes:
        read = [costs.weight_bytes(s.tokens) + costs.kv_bytes(s.contexts) for s in decodes]
        own, last = caches
        found["decode_bytes"] = median(read)
        rates = [size / s.wall for size, s in zip(read, decodes, strict=True)]
        fraction = median(rates) / (probe.read_gb_s * 1e9)
        if median(read) > (last if fraction > 1 else own):
            found["decode_fraction_of_bandwidth"] = fraction
        found["decode_fraction_of_int8_peak"] = median(
            costs.macs(s.tokens, s.tokens) / s.wall for s in decodes
        ) / (probe.int8_gmacs * 1e9)
        found["overhead_fraction"] = median((s.wall - s.inside) / s.wall for s in decodes)
    return found


def _median(values: list[Any]) -> float | None:
    there = [v for v in values if v is not None]
    return _rounded(median(there)) if there else None


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value
