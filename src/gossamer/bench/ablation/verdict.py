"""From rounds to a verdict: ratios of pairs, the interval they leave open, and what is too small to matter.

Both sides of a round run one after the other, so that what slows the machine slows both; a round gives one
ratio. Their centre is the Hodges-Lehmann estimate (the median of all means of two) and its 95 % interval
that of Wilcoxon's signed ranks (Hollander, Wolfe, Chicken: Nonparametric Statistical Methods, 2014, chapter
3), on logarithms: no distribution is assumed. It takes six rounds; fewer have Student's interval, which is
wide. A round that lies six robust standard deviations from the others, because something else had the
machine, is left out, at most one of five (Hampel's rule); its samples stay in the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, median, quantiles, stdev

from gossamer.bench.ledger import METRICS, Effect, Figure, Verdict

__all__ = ["SMALLEST", "effect", "exact", "figure", "overall", "typical", "verdict_of"]

SMALLEST = {"perplexity": 0.01, "other": 0.03}
"""Metric -> the least effect of interest, as a part."""
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's, two-sided 95 %, by rounds
_Z = 1.96
_FAR = 6 * 1.4826  # times the median absolute deviation, which is 1/1.4826 of a normal standard deviation


def figure(samples: Sequence[float]) -> Figure:
    """Samples with their median and quartiles."""
    if len(samples) == 1:
        return Figure((samples[0],), samples[0], samples[0], samples[0])
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return Figure(tuple(samples), middle, low, high)


def effect(metric: str, off: Sequence[float], on: Sequence[float], shape: str = "") -> Effect:
    """What a technique did to a metric, from samples of the same rounds. Every sample must be above 0, and
    there must be as many of both."""
    logs = [math.log(b / a) for a, b in zip(off, on, strict=True)]
    centre, low, high = _interval(_near(logs))
    return _effect(metric, math.exp(centre), math.exp(low), math.exp(high), shape)


def exact(metric: str, off: float, on: float, shape: str = "", error: float = 0.0) -> Effect:
    """The same for one figure of each side, such as bytes. error: standard error of the ratio's logarithm."""
    centre = math.log(on / off)
    low, high = math.exp(centre - _Z * error), math.exp(centre + _Z * error)
    return _effect(metric, on / off, low, high, shape)


def typical(off: Figure, on: Figure, ratio: float) -> tuple[float, float]:
    """Both sides of the round that comes nearest to the ratio of them all. Medians of each side need not show
    it, where the machine's speed moved between the rounds."""
    rounds = [(a, b) for a, b in zip(off.samples, on.samples) if 0 < a < math.inf and 0 < b < math.inf]
    if len(rounds) < 2 or not 0 < ratio < math.inf:
        return off.median, on.median
    return min(rounds, key=lambda pair: abs(math.log(pair[1] / pair[0] / ratio)))


def verdict_of(metric: str, ratio: float, low: float, high: float) -> Verdict:
    """'no difference' unless the whole interval lies to one side of 1 and the ratio far enough from it."""
    least = math.log1p(SMALLEST.get(metric, SMALLEST["other"]))
    if low <= 1 <= high or abs(math.log(ratio)) < least:
        return "no difference"
    better = ratio > 1 if METRICS[metric][2] == "higher" else ratio < 1
    return "gains" if better else "loses"


def overall(effects: Sequence[Effect], metrics: Sequence[str]) -> Verdict:
    """One word for several metrics of one kind: whatever there is besides 'no difference'; where some gain
    and some lose, what the first says that does either."""
    found = {e.metric: e.verdict for e in effects if e.metric in metrics and e.verdict != "no difference"}
    return next((found[metric] for metric in metrics if metric in found), "no difference")


def _effect(metric: str, ratio: float, low: float, high: float, shape: str) -> Effect:
    verdict = verdict_of(metric, ratio, low, high)
    return Effect(metric=metric, ratio=ratio, low=low, high=high, verdict=verdict, shape=shape)


def _near(logs: Sequence[float]) -> list[float]:
    """Without those far from all others."""
    middle = median(logs)
    far = _FAR * median(abs(x - middle) for x in logs)
    ordered = sorted(logs, key=lambda x: abs(x - middle))
    kept = len(logs) - len(logs) // 5
    return ordered[:kept] + [x for x in ordered[kept:] if abs(x - middle) <= far]


def _interval(logs: Sequence[float]) -> tuple[float, float, float]:
    """Centre and 95 % interval."""
    n = len(logs)
    if n < 2:  # nothing is known of how much it varies
        return logs[0], -math.inf if n == 0 else logs[0] - 10, logs[0] + 10
    if n < 6:
        centre, half = mean(logs), _T[n] * stdev(logs) / math.sqrt(n)
        return centre, centre - half, centre + half
    walsh = sorted((a + b) / 2 for i, a in enumerate(logs) for b in logs[i:])
    count = len(walsh)
    cut = _signed_rank(n)
    centre = (walsh[(count - 1) // 2] + walsh[count // 2]) / 2
    return centre, walsh[cut], walsh[count - 1 - cut]


def _signed_rank(n: int) -> int:
    """The largest c with P(signed-rank statistic <= c) <= 2.5 %, exactly, from the ways to reach each sum."""
    ways = [1]
    for rank in range(1, n + 1):
        more = ways + [0] * rank
        for total, count in enumerate(ways):
            more[total + rank] += count
        ways = more
    below, limit = 0, 0.025 * 2**n
    for total, count in enumerate(ways):
        below += count
        if below > limit:
            return total - 1
    raise AssertionError("all ways together are more than 2.5 %")
