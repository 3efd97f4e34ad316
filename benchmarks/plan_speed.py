"""Predicted speed against measured speed, over configurations that no efficiency was fitted from.

`python -m benchmarks.plan_speed` runs each configuration as `gossamer bench latency` or `throughput` does,
normalises it by the probe of the same run, and prints predicted and measured times and the errors of them
all. Runs on a machine that others use say so (its cpu share and the spread of its probes) and are repeated.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from gossamer.bench.latency import LatencyWorkload, bench_latency
from gossamer.bench.measure import recording
from gossamer.bench.prediction import predicted_jobs, probe_spread
from gossamer.bench.throughput import run_jobs
from gossamer.bench.workload import make_jobs, random_lengths, uncached
from gossamer.config import EngineConfig, HardwareKernels, MixedPrecision, ParallelComputing, Quantization
from gossamer.planner.hardware import Prober, median_rates
from gossamer.planner.history import percentile
from gossamer.runtime.start import start

METRICS = ("ttft_ms", "itl_ms", "tokens_per_s")
_SHARED = Path(__file__).parents[1].parent / "shared" / "models"
_QUIET_SPREAD = 0.2
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration: model, stored format ("" as it is), KV type, sequences, prompt, output; jobs: how
    many of mixed lengths go through `batch` places, in place of one batch."""

    model: str
    stored: str
    kv: str
    batch: int
    prompt: int
    output: int
    jobs: int = 0
    other: str = ""

    @property
    def name(self) -> str:
        """As it is listed."""
        mix = f" mix {self.jobs}" if self.jobs else ""
        extra = f" {self.other}" if self.other else ""
        lengths = f"x{self.batch} {self.prompt}+{self.output}"
        return f"{self.model} {self.stored or 'f32'} kv {self.kv} {lengths}{mix}{extra}"


CASES = (
    Case("stories260K", "", "bf16", 1, 64, 64),
    Case("stories260K", "", "f32", 16, 128, 32),
    Case("stories260K", "int8", "bf16", 32, 16, 64),
    Case("pocket", "", "bf16", 1, 128, 64),
    Case("pocket", "bf16", "bf16", 4, 200, 48),
    Case("pocket", "int8", "int8", 16, 64, 48),
    Case("pocket", "int4-g64", "bf16", 1, 400, 64),
    Case("pocket", "nf4", "bf16", 8, 100, 48),
    Case("pocket", "int8", "bf16", 8, 128, 48, other="unfused"),
    Case("pocket", "int4-g32", "bf16", 16, 64, 48, jobs=48),
    Case("pocket", "bf16", "int4", 8, 96, 40, jobs=32),
    Case("smollm2-135m", "", "bf16", 1, 64, 16),
    Case("smollm2-135m", "bf16", "bf16", 1, 128, 32),
    Case("smollm2-135m", "bf16", "int8", 16, 48, 24),
    Case("smollm2-135m", "int8", "bf16", 1, 256, 48),
    Case("smollm2-135m", "int8", "bf16", 8, 64, 32),
    Case("smollm2-135m", "int4-g64", "bf16", 1, 128, 48),
    Case("smollm2-135m", "int4-g64", "int8", 32, 32, 24),
    Case("smollm2-135m", "int4-g32", "f16", 2, 300, 32),
    Case("smollm2-135m", "nf4", "bf16", 4, 128, 32),
    Case("smollm2-135m", "int8", "bf16", 4, 100, 32, other="unfused"),
    Case("smollm2-135m", "int8", "bf16", 8, 64, 24, jobs=24),
    Case("smollm2-135m", "int4-g64", "bf16", 4, 160, 32, other="1 thread"),
    Case("smollm2-135m", "int8", "bf16", 2, 64, 24, other="avx2"),
    Case("qwen3-0.6b", "int4-g128", "bf16", 1, 128, 24),
    Case("qwen3-0.6b", "int8", "bf16", 4, 96, 16),
    Case("qwen3-0.6b", "bf16", "bf16", 1, 48, 12),
    Case("qwen3-0.6b", "int4-g64", "int8", 16, 32, 16),
    Case("llama-3.2-1b", "int4-g64", "bf16", 1, 64, 16),
    Case("llama-3.2-1b", "int8", "bf16", 2, 48, 12),
    Case("llama-3.2-1b", "int4-g32", "bf16", 8, 32, 12),
)


def configuration(case: Case) -> EngineConfig:
    """What the engine is started with."""
    shape = _SHARED / "shapes" / case.model
    paths = {"pocket": "gossamer/pocket", "stories260K": str(_SHARED / "stories260K")}
    config = EngineConfig(
        model=paths.get(case.model, str(shape)),
        load_format="auto" if case.model in paths else "dummy",
        quantization=Quantization.parse(case.stored) if case.stored not in ("", "bf16") else None,
        mixed_precision=MixedPrecision(dtype="bf16") if case.stored == "bf16" else None,
        kv_dtype=case.kv,  # type: ignore[arg-type]
        max_num_seqs=case.batch,
        max_model_len=min(512, 2 * (case.prompt + case.output)),
    )
    if case.other == "unfused":
        return replace(config, operator_fusion=None, layer_fusion=None)
    if case.other == "1 thread":
        return replace(config, parallel_computing=ParallelComputing(threads=1))
    if case.other:
        return replace(config, hardware_kernels=HardwareKernels(isa=case.other))  # type: ignore[arg-type]
    return config


def measure(case: Case) -> dict[str, Any]:
    """Predicted and measured metrics of a case, and how quiet the machine was."""
    best: dict[str, Any] = {}
    for _ in range(_ATTEMPTS):
        found = _mix(case) if case.jobs else _batch(case)
        if not best or _noise(found) < _noise(best):
            best = found
        if _noise(best) <= _QUIET_SPREAD:
            break
    return asdict(case) | {"name": case.name} | best


def _noise(found: dict[str, Any]) -> float:
    return float(found["spread"])


def _batch(case: Case) -> dict[str, Any]:
    work = LatencyWorkload(input_len=case.prompt, output_len=case.output, batch_size=case.batch, runs=4)
    report = bench_latency(uncached(configuration(case)), work)
    told = report["prediction"]
    return {
        "predicted": told["predicted"],
        "actual": told["actual"],
        "errors": told["errors"],
        "cpu_share": report["cpu_share"],
        "spread": report["probe_spread"],
        "probe": report["probe"],
    }


def _mix(case: Case) -> dict[str, Any]:
    started = start(uncached(configuration(case)))
    engine, recorder = recording(started)
    prober = Prober(None, started.threads)
    lengths = random_lengths(case.jobs, case.prompt, case.output, 0.5, 0)
    run_jobs(engine, recorder, make_jobs(lengths[:2], [0.0] * 2, started.graph.vocab, 1))
    rates, outcomes = [prober.measure()], []
    for seed in range(3):
        jobs = make_jobs(lengths, [0.0] * case.jobs, started.graph.vocab, seed)
        outcomes.append(run_jobs(engine, recorder, jobs))
        rates.append(prober.measure())
    probe = median_rates(rates)
    predicted = predicted_jobs(started, probe, lengths)
    actual = {
        "ttft_ms": 1e3 * median(median(o.ttft) for o in outcomes),
        "itl_ms": 1e3 * median(median(o.itl) for o in outcomes),
        "tokens_per_s": median(sum(map(len, o.tokens)) / o.seconds for o in outcomes),
    }
    return {
        "predicted": predicted,
        "actual": actual,
        "errors": {name: predicted[name] / value - 1 for name, value in actual.items() if name in predicted},
        "cpu_share": median(o.cpu / o.seconds for o in outcomes) / started.threads,
        "spread": probe_spread(rates),
        "probe": asdict(probe),
    }


def show_lines(found: list[dict[str, Any]]) -> None:
    """Predicted / measured of each."""
    for line in found:
        told, came, errors = line["predicted"], line["actual"], line["errors"]
        parts = [
            f"{name} {told[name]:9.3f} / {came[name]:9.3f} {errors[name]:+6.1%}"
            for name in METRICS
            if name in errors
        ]
        print(
            f"{line['name']:44s} {'   '.join(parts)}   "
            f"cpu {line['cpu_share']:.2f} spread {line['spread']:.2f}",
            flush=True,
        )


def show_errors(found: list[dict[str, Any]]) -> None:
    """Sizes of the errors, of all and of those on a quiet machine."""
    for quiet in (False, True):
        lines = [x for x in found if not quiet or x["spread"] <= _QUIET_SPREAD]
        for name in METRICS:
            errors = [abs(x["errors"][name]) for x in lines if name in x["errors"]]
            if errors:
                print(
                    f"{'quiet' if quiet else 'all'} {len(errors):3d} {name:14s} "
                    f"median {median(errors):6.1%}  90 % {percentile(errors, 0.9):6.1%}  "
                    f"worst {max(errors):6.1%}"
                )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="first:last of the list, or a part of the names")
    parser.add_argument("--json", type=Path, help="file to add results to")
    parser.add_argument("--show", action="store_true", help="print what the file holds, measure nothing")
    asked = parser.parse_args()
    known = json.loads(asked.json.read_text()) if asked.json and asked.json.exists() else []
    if asked.show:
        show_lines(known)
        show_errors(known)
        return 0
    first, colon, last = asked.only.partition(":")
    cases = (
        CASES[int(first or 0) : int(last or len(CASES))]
        if colon
        else [c for c in CASES if asked.only in c.name]
    )
    found = []
    for case in cases:
        if case.model != "pocket" and not _SHARED.exists():
            print(f"{case.name}: {_SHARED} is not here", file=sys.stderr)
            continue
        found.append(measure(case))
        show_lines(found[-1:])
        gc.collect()
        if asked.json:
            names = {line["name"] for line in found}
            asked.json.write_text(json.dumps([x for x in known if x["name"] not in names] + found))
    show_errors(found)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
