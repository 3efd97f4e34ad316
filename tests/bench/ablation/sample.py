"""A ledger as a whole run makes it, without the run: gains, losses, noise, and what could not be measured."""

from __future__ import annotations

import math
from random import Random
from statistics import median, quantiles

from gossamer.bench.ledger import METRICS, Effect, Figure, Ledger, Mode, Proof, Row, Side, Verdict
from gossamer.techniques.card import Card, Metric

__all__ = ["CARDS", "card", "effect", "figure", "ledger", "row", "side"]

MB = float(1 << 20)
# technique: (handbook's row, title, Chinese, what it moves, factors on metrics, noise)
_TECHNIQUES: dict[str, tuple[str, str, str, tuple[Metric, ...], dict[str, float], float]] = {
    "quantization": ("1.1", "Quantization", "量化", ("weights_bytes", "itl_ms", "tokens_per_s"),
                     {"weights_bytes": 0.29, "itl_ms": 0.46, "tokens_per_s": 1.93, "ttft_ms": 1.12,
                      "kl": 12.0, "perplexity": 1.031}, 0.02),
    "pruning": ("1.2", "Pruning", "剪枝", ("weights_bytes", "itl_ms"),
                {"weights_bytes": 0.66, "itl_ms": 0.88, "tokens_per_s": 1.06}, 0.02),
    "distillation": ("1.3", "Knowledge distillation", "知识蒸馏", ("weights_bytes", "tokens_per_s"),
                     {"weights_bytes": 0.52, "kv_bytes": 0.6, "itl_ms": 0.55, "tokens_per_s": 1.8,
                      "ttft_ms": 0.53, "kl": 400.0, "perplexity": 1.24}, 0.03),
    "operator_fusion": ("2.1", "Operator fusion", "算子融合", ("arena_bytes", "itl_ms"),
                        {"arena_bytes": 0.81, "itl_ms": 0.94, "tokens_per_s": 1.05, "ttft_ms": 0.95}, 0.015),
    "layer_fusion": ("2.2", "Layer fusion", "层融合", ("arena_bytes", "ttft_ms"),
                     {"arena_bytes": 0.37, "ttft_ms": 0.97, "itl_ms": 1.003}, 0.02),
    "dynamic_shapes": ("2.3", "Dynamic shapes", "动态形状", ("arena_bytes", "tokens_per_s"),
                       {"arena_bytes": 0.7, "tokens_per_s": 3.1, "ttft_ms": 0.31, "itl_ms": 0.5}, 0.03),
    "paged_attention": ("3.1", "PagedAttention", "分页注意力", ("kv_bytes", "tokens_per_s"),
                        {"kv_bytes": 0.38, "tokens_per_s": 1.62, "itl_ms": 1.09, "ttft_ms": 0.6}, 0.04),
    "memory_reuse": ("3.3", "Memory reuse", "内存复用", ("arena_bytes",),
                     {"arena_bytes": 0.06, "tokens_per_s": 1.004}, 0.02),
    "continuous_batching": ("4.1", "Continuous batching", "连续批处理", ("tokens_per_s",),
                            {"tokens_per_s": 2.1, "ttft_ms": 0.3, "itl_ms": 1.2}, 0.03),
    "dynamic_batching": ("4.2", "Dynamic batching", "动态批处理", ("itl_ms",),
                         {"itl_ms": 0.93, "tokens_per_s": 0.99, "ttft_ms": 1.05}, 0.16),
    "parallel_computing": ("4.3", "Parallel computing", "并行计算", ("tokens_per_s", "itl_ms"),
                           {"tokens_per_s": 1.86, "itl_ms": 0.53, "ttft_ms": 0.53}, 0.02),
    "mixed_precision": ("5.1", "Mixed precision", "混合精度", ("weights_bytes", "itl_ms"),
                        {"weights_bytes": 0.5, "itl_ms": 0.58, "tokens_per_s": 1.6, "ttft_ms": 0.62,
                         "kl": 1.0, "perplexity": 1.0002}, 0.02),
    "hardware_kernels": ("5.2", "Hardware-specific kernels", "硬件专用内核", ("tokens_per_s",),
                         {"tokens_per_s": 6.0, "itl_ms": 0.16, "ttft_ms": 0.14}, 0.03),
    "flash_attention": ("5.3", "FlashAttention", "FlashAttention", ("arena_bytes", "ttft_ms"),
                        {"arena_bytes": 0.5, "ttft_ms": 0.9, "tokens_per_s": 1.02}, 0.02),
    "speculative_decoding": ("6.2", "Speculative decoding", "投机解码", ("itl_ms",),
                             {"itl_ms": 1.21, "tokens_per_s": 0.84, "ttft_ms": 1.01,
                              "resident_bytes": 1.05}, 0.02),
}  # fmt: skip
_NOT_BUILT = {
    "offloading": ("3.2", "Sharding and offloading", "分片与卸载"),
    "sequence_parallelism": ("6.1", "Sequence parallelism", "序列并行"),
}
_START = {
    "weights_bytes": 540 * MB, "kv_bytes": 96 * MB, "arena_bytes": 44 * MB, "ttft_ms": 2100.0, "itl_ms": 88.0,
    "tokens_per_s": 14.0, "kl": 0.0004, "perplexity": 11.8,
}  # fmt: skip
_QUALITY = ("kl", "perplexity")
_ORDER = (
    "dynamic_shapes", "hardware_kernels", "parallel_computing", "flash_attention", "mixed_precision",
    "operator_fusion", "layer_fusion", "memory_reuse", "paged_attention", "continuous_batching",
    "quantization", "speculative_decoding",
)  # fmt: skip


def card(name: str, number: str = "9.9", title: str = "", zh: str = "", metrics: tuple[Metric, ...] = (),
         built: bool = True) -> Card:  # fmt: skip
    """A card with text in every field."""
    return Card(
        name=name, row=number, title=title or name, title_zh=zh or name, metrics=metrics, built=built,
        principle=f"What {title or name} does, in a line & with < signs.",
        memory_promise="50-75 % less", speed_promise="1.5-2x", here="what exists, in words",
        tools=("vLLM", "TensorRT"), applicability="nearly all models", trade_off="accuracy against size",
        baseline="the same model without it", off=f"--no-{name.replace('_', '-')}", code=("src",),
        tests=("tests",), missing="" if built else "one machine is all there is",
        papers=("A paper about it (2023), arXiv:2309.06180", "An older book (1998)"),
    )  # fmt: skip


CARDS = tuple(
    sorted(
        [card(name, *about[:4]) for name, about in _TECHNIQUES.items()]
        + [card(name, *about, built=False) for name, about in _NOT_BUILT.items()],
        key=lambda c: c.row,
    )
)


def figure(*samples: float) -> Figure:
    if len(samples) == 1:
        return Figure(samples, samples[0], samples[0], samples[0])
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return Figure(samples, median(samples), low, high)


def side(name: str, **figures: float | Figure) -> Side:
    known = {k: v if isinstance(v, Figure) else figure(v) for k, v in figures.items()}
    return Side(name=name, config=f"--{name.replace(' ', '-')}", figures=known)


def effect(
    metric: str, ratio: float, width: float = 0.01, shape: str = "", verdict: Verdict | None = None
) -> Effect:
    """Judged as the ledger does: the whole interval on one side, and 3 % at least."""
    if verdict is None:
        clear = width < abs(math.log(ratio)) and abs(math.log(ratio)) >= 0.03
        better = (ratio > 1) == (METRICS[metric][2] == "higher")
        verdict = ("gains" if better else "loses") if clear else "no difference"
    low, high = ratio * math.exp(-width), ratio * math.exp(width)
    return Effect(metric=metric, ratio=ratio, low=low, high=high, verdict=verdict, shape=shape)


def row(technique: str, mode: Mode, off: Side | None, on: Side | None, effects: tuple[Effect, ...] = (),
        note: str = "", proof: Proof | None = None) -> Row:  # fmt: skip
    return Row(
        technique=technique, mode=mode, off=off, on=on, effects=effects, note=note, proof=proof or Proof()
    )


def ledger(rows: tuple[Row, ...] | None = None, model: str = "gossamer/pocket", rounds: int = 9) -> Ledger:
    """rows: None is a whole run of all techniques in all modes."""
    return Ledger(
        model=model,
        speed_shape="135m",
        machine={
            "cpu": "AMD EPYC 9R14", "cores": 2, "isas": ["scalar", "avx2", "avx512"], "best_isa": "avx512",
            "caches": [{"level": 1, "kind": "data", "bytes": 32768, "shared_by": 1},
                       {"level": 3, "kind": "unified", "bytes": 33554432, "shared_by": 16}],
            "memory_total": 16 << 30, "memory_available": 13 << 30, "memory_limit": None,
        },
        rates={"read_gb_s": 31.2, "int8_gmacs": 812.0, "bf16_gmacs": 402.5, "fp32_gmacs": 151.0, "threads": 2,
               "isa": "avx512"},
        began="2026-11-30T19:40:12+00:00",
        seconds=1754.3,
        rounds=rounds,
        settings={"techniques": list(_TECHNIQUES), "modes": ["alone", "cumulative", "without"],
                  "smallest_effect": {"perplexity": 0.01, "kl": 0.01, "other": 0.03}, "cpu_share": 0.98,
                  "probe_moved": 1.04,
                  "interrupted": False, "seconds_limit": None,
                  "work": {"usual": {"requests": 16, "quotes": False}}},
        rows=_rows(rounds) if rows is None else rows,
        versions={"gossamer": "0.1.0", "python": "3.11.9", "numpy": "2.1.3"},
    )  # fmt: skip


def _rows(rounds: int) -> tuple[Row, ...]:
    random = Random(6)
    alone = _START | {"tokens_per_s": 310.0, "ttft_ms": 240.0, "itl_ms": 9.4}
    rows = [_compared(name, "alone", dict(alone), random, rounds) for name in _TECHNIQUES]
    rows += [
        row(name, "alone", None, None, note="not built: one machine is all there is") for name in _NOT_BUILT
    ]
    held, before = dict(_START), "everything off"
    for name in _ORDER:
        rows.append(_compared(name, "cumulative", held, random, rounds, before))
        before = f"+ {name.replace('_', ' ')}"
    for name in (
        "quantization",
        "paged_attention",
        "operator_fusion",
        "parallel_computing",
        "speculative_decoding",
    ):
        factors = _TECHNIQUES[name][4]  # the whole less this one, with which it is the whole again
        less = {metric: value / factors.get(metric, 1.0) for metric, value in held.items()}
        rows.append(_compared(name, "without", less, random, rounds, f"- {name.replace('_', ' ')}"))
    rows.append(
        row("mixed_precision", "without", None, None, note="with quantization on, no matrix is left for it")
    )
    return tuple(rows)


def _compared(
    name: str, mode: Mode, held: dict[str, float], random: Random, rounds: int, before: str = ""
) -> Row:
    """A row from `held`, which becomes what it is with the technique on."""
    factors, noise = _TECHNIQUES[name][4:]
    words = name.replace("_", " ")
    sides: list[dict[str, Figure]] = [{}, {}]
    effects = []
    for metric, value in list(held.items()):
        factor = factors.get(metric, 1.0)
        if metric in _QUALITY and "kl" not in factors:
            continue
        many = METRICS[metric][1] in ("ms", "tok/s")
        for found, middle in zip(sides, (value, value * factor)):
            samples = [middle * random.lognormvariate(0, noise) for _ in range(rounds)] if many else [middle]
            found[metric] = figure(*samples)
        held[metric] = value * factor
        if metric != "kl" and not (metric.endswith("bytes") and factor == 1.0 and mode != "alone"):
            ratio = sides[1][metric].median / sides[0][metric].median
            effects.append(effect(metric, ratio, 1.5 * noise if many else 0.004, "135m" if many else ""))
    for found in sides:
        total = sum(found[m].median for m in ("weights_bytes", "kv_bytes", "arena_bytes"))
        found["resident_bytes"] = figure(total + 61 * MB)
    ratio = sides[1]["resident_bytes"].median / sides[0]["resident_bytes"].median
    effects.append(effect("resident_bytes", ratio, 0.002))
    kernels = tuple((f"linear_int4_{k}x{name} (avx512)", 1200 * (k + 1), 3 << 20 + k) for k in range(3))
    on = "everything on" if mode == "without" else words if mode == "alone" else f"+ {words}"
    off = before or f"without {words}"
    same = "9 of 72" if "kl" in factors else "all of 72"
    return Row(
        technique=name,
        mode=mode,
        off=Side(name=off, config=_config(off), figures=sides[0]),
        on=Side(name=on, config=_config(on), figures=sides[1]),
        effects=tuple(effects),
        proof=Proof(kernels=kernels, facts=("9 kernels ran that the baseline has not",
                                            f"the same tokens in {same} requests")),
        note="times are of the mix: the mean to first token" if name == "continuous_batching" else "",
    )  # fmt: skip


def _config(name: str) -> str:
    """Flags; the last of the cumulative steps is everything."""
    whole = name in ("everything on", "+ speculative decoding")
    return "-q int4 --speculative-method ngram" if whole else f"--dtype bfloat16 --for '{name}'"
