"""The time model: a step takes what its bytes and its arithmetic take at the rates that kernels reach."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.config import EngineConfig
from gossamer.graph.ir import Graph
from gossamer.planner.costs import step_costs
from gossamer.planner.efficiencies import Efficiencies
from gossamer.planner.hardware import Rates
from gossamer.planner.workload import Workload

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """ttft_ms: of a prompt that comes alone; itl_ms: between a request's tokens with the workload's
    concurrency in decode; decode_tokens_per_s: of all sequences in decode together; tokens_per_s: output of
    requests that come as fast as others end, prefill included; parts: (what, ms) of a decode step."""

    ttft_ms: float
    itl_ms: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    tokens_per_s: float
    parts: tuple[tuple[str, float], ...]


def predict(
    graph: Graph, config: EngineConfig, work: Workload, rates: Rates, efficiencies: Efficiencies
) -> Prediction:
    """What a configuration would do. graph: after its passes."""
    costs = step_costs(graph, config.kv_dtype)
    running = min(work.concurrency, config.max_num_seqs)

    def step(tokens: int, rows: int, contexts: list[int]) -> float:
        read = (costs.weight_bytes(tokens) + costs.kv_bytes(contexts)) / (
            rates.read_gb_s * 1e9 * efficiencies.bandwidth
        )
        work_s = costs.macs(tokens, rows) / (rates.int8_gmacs * 1e9 * efficiencies.compute)
        return max(read, work_s) + efficiencies.overhead_us * 1e-6

    prefill = step(work.prompt_tokens, 1, [work.prompt_tokens])
    middle = work.prompt_tokens + work.output_tokens // 2
    decode = step(running, running, [middle] * running)
    whole = work.output_tokens * decode / running + prefill
    return Prediction(
        ttft_ms=1e3 * prefill,
        itl_ms=1e3 * decode,
        prefill_tokens_per_s=work.prompt_tokens / prefill,
        decode_tokens_per_s=running / decode,
        tokens_per_s=work.output_tokens / whole,
        parts=(("step", 1e3 * decode),),
    )
