"""The shape of gossamer/pocket, and its graph as the torch module that trains (the reference backend).

There is no model definition here: `config.json` becomes a graph as it does for any model, and checkpoints
hold tensors under the names that graph's family gives them, Hugging Face's.

Shape legend: B sequences, T tokens of each, R rows that need logits, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.backends.reference import ReferenceModel, export_tensors
from gossamer.graph.families import build_graph
from gossamer.graph.ops.attention import KVState, SpanRows

INTO_RESIDUAL = ("out_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class PocketConfig:
    """The fields of a Llama `config.json` that the shape depends on, under their Hugging Face names."""

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def to_hf(self, *, end_of_book: int = 0) -> dict[str, Any]:
        """The whole `config.json`; `end_of_book` is both the first and the last token of a text."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "rope_scaling": None,
            "pretraining_tp": 1,
            "use_cache": True,
            "bos_token_id": end_of_book,
            "eos_token_id": end_of_book,
            "torch_dtype": "bfloat16",
        }

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> PocketConfig:
        """From the fields of a `config.json`; those that do not shape the model are left out."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})

    @classmethod
    def read(cls, path: Path) -> PocketConfig:
        """Reads `config.json`."""
        return cls.from_hf(json.loads(path.read_text()))


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A `WeightSource` over tensors in memory, by Hugging Face name."""

    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> npt.NDArray[Any]:
        """A whole tensor, as float32."""
        return self.tensors[name].float().numpy()

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of it."""
        return self.read(name)[start:stop]

    def release(self, name: str) -> None:
        """Nothing to release."""

    def content_key(self) -> str:
        """A fixed name: nothing made from these tensors is ever cached."""
        return "tensors in memory"


def build(config: PocketConfig, weights: Mapping[str, Tensor] | None = None) -> ReferenceModel:
    """The model in float32, with `weights` by Hugging Face name, or with uninitialised ones."""
    graph = build_graph(config.to_hf(), name="gossamer/pocket")
    return ReferenceModel(graph) if weights is None else ReferenceModel.load(graph, TensorSource(weights))


def hf_weights(model: ReferenceModel) -> dict[str, Tensor]:
    """The weights as the checkpoint's tensors; they share the model's memory."""
    return {name: torch.from_numpy(np.asarray(array)) for name, array in export_tensors(model).items()}


def initialize(model: ReferenceModel, config: PocketConfig, seed: int) -> None:
    """Normal weights from `seed`, norms at 1; projections into the residual shrink with depth (GPT-2)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
                continue
            scale = (2 * config.num_hidden_layers) ** -0.5 if name.endswith(INTO_RESIDUAL) else 1.0
            weight.normal_(0.0, config.initializer_range * scale, generator=generator)


def loss(model: ReferenceModel, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross entropy in nats, matrix products in bfloat16."""
    with torch.autocast(ids_BT.device.type, torch.bfloat16):
        logits_BTV = model.logits(ids_BT)
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def logits_at(model: ReferenceModel, ids_BT: Tensor, rows_R: Tensor) -> Tensor:
    """Logits `[R, V]` of the rows asked for, of the B * T rows of a batch."""
    batch, length = ids_BT.shape
    positions = torch.arange(batch * length) % length
    spans = tuple(SpanRows(b, b * length, length, 0) for b in range(batch))
    out: Tensor = model(ids_BT.flatten(), positions, rows_R, KVState(spans))["logits"]
    return out
