"""A small llama and its plans, for the tests of the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.config import EngineConfig, MixedPrecision
from gossamer.graph.families import build_graph
from gossamer.planner.hardware import Rates
from gossamer.planner.model import PlannedModel

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
RATES = Rates(read_gb_s=10.0, int8_gmacs=300.0, bf16_gmacs=100.0, fp32_gmacs=60.0, threads=2, isa="avx2")
BASE = EngineConfig(model="m", mixed_precision=MixedPrecision(), load_format="dummy")


def planned(directory: Path = Path("/nowhere"), **fields: object) -> PlannedModel:
    """A model of which config.json alone is here."""
    return PlannedModel(
        name="m",
        graph=build_graph(CONFIG | fields, name="m"),
        directory=directory,
        certificate=None,
        complete=False,
    )
