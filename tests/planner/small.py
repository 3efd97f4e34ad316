"""A small Llama and a machine whose numbers are round."""

from __future__ import annotations

from typing import Any

from gossamer.config import EngineConfig
from gossamer.graph.families import build_graph
from gossamer.graph.ir import Graph
from gossamer.passes.pipeline import run_passes
from gossamer.planner.efficiencies import (
    ROWS,
    AttentionRate,
    Efficiencies,
    LinearRate,
    PythonCosts,
    Table,
    VectorRate,
)
from gossamer.planner.hardware import Rates

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
RATES = Rates(read_gb_s=10.0, int8_gmacs=200.0, bf16_gmacs=100.0, fp32_gmacs=50.0, threads=2, isa="scalar")
FREE = VectorRate(overhead_us=0.0, number_ns=0.0)


def config(**options: Any) -> EngineConfig:
    """Of the small model."""
    return EngineConfig(model="small", load_format="dummy", **options)


def graph(given: EngineConfig | None = None, **fields: Any) -> Graph:
    """Its graph after the passes of a configuration."""
    return run_passes(build_graph(SHAPE | fields, name="small"), given or config())[0]


def efficiencies(
    linear: LinearRate | None = None, vector: VectorRate = FREE, attention: AttentionRate | None = None
) -> Efficiencies:
    """Full rates, and nothing else takes time but what is given."""
    full = LinearRate(bandwidth=1.0, compute=(1.0,) * len(ROWS), output_ns=0.0, head_ns=0.0, overhead_us=0.0)
    still = AttentionRate(overhead_us=0.0, tile_us=0.0, row_us=0.0, key_ns=0.0, pair_ns=0.0)
    formats = ("f32", "bf16", "int8", "int4-g64")
    table = Table(
        threads=2,
        peaks={"int8": 100.0, "bf16": 50.0, "fp32": 25.0},
        read_gb_s=10.0,
        linear=dict.fromkeys(formats, linear or full),
        vector={"add": vector},
        attention={"bf16": attention or still},
    )
    nothing = PythonCosts(step_us=0.0, cold_us=0.0, sequence_us=0.0, token_us=0.0, request_us=0.0)
    return Efficiencies(tables={"scalar": (table,)}, python=nothing, single_read=0.5)
