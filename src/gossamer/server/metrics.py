"""Prometheus metrics under vLLM's names, so that dashboards made for it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gossamer.engine.engine import Stats
from gossamer.text_engine import TextUpdate

__all__ = ["Metrics"]

# vLLM's buckets: its dashboards draw their quantiles from them.
_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)  # fmt: skip
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """One model's metrics in a registry of their own.

    prefix: before the colon of every name; model: the label model_name. All times are seconds.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, prefix: str, model: str) -> None:
        self._registry = CollectorRegistry()
        self._prefix, self._model = prefix, model

        def histogram(name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"{prefix}:{name}", says, ["model_name"], buckets=buckets, registry=self._registry
            )
            return made.labels(model)

        self._ttft = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT
        )
        self._itl = histogram("inter_token_latency_seconds", "Between two tokens of an output.", _ITL)
        self._e2e = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST)
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first step.", _REQUEST)
        self._prefill = histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", _REQUEST
        )
        self._decode = histogram("request_decode_time_seconds", "From the first token to the end.", _REQUEST)
        self._success = Counter(
            f"{prefix}:request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model, reason)

    def follow(self, stats: Callable[[], Stats]) -> None:
        """Shows an engine's gauges and counters as they are at each scrape."""
        self._registry.register(_EngineCollector(stats, self._prefix, self._model))

    def tokens(self, arrival: float, last: dict[int, float], update: TextUpdate, now: float) -> None:
        """An output got tokens. last: when each output of its request last did; is brought up to date."""
        if not last:
            self._ttft.observe(now - arrival)
        previous = last.get(update.index)
        if previous is not None:
            for _ in update.tokens:
                self._itl.observe((now - previous) / len(update.tokens))
        last[update.index] = now

    def finished(self, arrival: float, update: TextUpdate, now: float) -> None:
        """The last output of a request ended with this update."""
        self._success.labels(self._model, update.finish_reason).inc()
        self._e2e.observe(now - arrival)
        scheduled = update.times.get("first_scheduled")
        self._queue.observe((now if scheduled is None else scheduled) - arrival)
        first = update.times.get("first_token")
        if scheduled is not None and first is not None:
            self._prefill.observe(first - scheduled)
            self._decode.observe(now - first)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], Stats], prefix: str, model: str) -> None:
        self._stats, self._prefix, self._model = stats, prefix, model

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, says, value in (
            ("num_requests_running", "Outputs that take part in steps.", stats.running),
            ("num_requests_waiting", "Outputs that wait for a place or for pages.", stats.waiting),
            ("kv_cache_usage_perc", "Part of the KV pages that is held; 1 is all.", stats.kv_usage),
        ):
            gauge = GaugeMetricFamily(f"{self._prefix}:{name}", says, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, says, value in (
            ("num_preemptions", "Outputs sent back to the queue to make room.", stats.preemptions),
            ("prompt_tokens", "Prompt tokens of outputs that got a token.", stats.prompt_tokens),
            ("generation_tokens", "Output tokens.", stats.output_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
            ("num_swaps", "Preemptions that kept their pages on the slower tier.", stats.swaps),
            ("spec_decode_num_draft_tokens", "Tokens of drafts verified.", stats.drafted),
            ("spec_decode_num_accepted_tokens", "Tokens of drafts that stood.", stats.accepted),
        ):
            counter = CounterMetricFamily(f"{self._prefix}:{name}", says, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
