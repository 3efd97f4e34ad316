"""The names that dashboards made for vLLM ask for."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.server.serving import Live, serving, text_engine

NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
)


def test_a_request_is_counted(live: Live) -> None:
    before = live.metrics()
    assert {f"gossamer:{name}" for name in NAMES} <= set(before)
    usage = live.complete(max_tokens=10, n=2).json()["usage"]
    after = live.metrics()
    rise = {name: after[f"gossamer:{name}"] - before[f"gossamer:{name}"] for name in (
        "generation_tokens_total", "request_success_total", "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count", "request_prefill_time_seconds_count",
        "request_decode_time_seconds_count",
    )}  # fmt: skip
    assert rise.pop("generation_tokens_total") == usage["completion_tokens"] == 20
    assert rise.pop("inter_token_latency_seconds_count") == 18
    assert set(rise.values()) == {1}
    parts = ("request_queue_time", "request_prefill_time", "request_decode_time", "e2e_request_latency")
    *phases, whole = (after[f"gossamer:{p}_seconds_sum"] - before[f"gossamer:{p}_seconds_sum"] for p in parts)
    assert abs(sum(phases) - whole) < 1e-3


def test_the_prefix_can_be_that_of_vllm(model: Path) -> None:
    with serving(text_engine(model), metrics_prefix="vllm") as live:
        for family in text_string_to_metric_families(live.http.get("/metrics").text):
            assert all(sample.labels["model_name"] == live.model for sample in family.samples)
        assert {f"vllm:{name}" for name in NAMES} <= set(live.metrics())
