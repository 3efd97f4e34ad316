"""Draft heads on disk: a directory with config.json (model_type "gossamer_eagle") and model.safetensors.

The file holds the head's own weights alone; embedding, final norm and logits come from the target's
checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.checkpoint.codes import Codes, Scattered
from gossamer.checkpoint.hub import read_config, resolve_model
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.checkpoint.weights import Array, WeightSource, check_tensors
from gossamer.errors import CheckpointError, ConfigError
from gossamer.graph.families.eagle import build_eagle, own_weights
from gossamer.graph.ir import Graph
from gossamer.graph.weights import leaves

__all__ = ["HEAD_FOLDER", "HEAD_TYPE", "Joined", "find_head", "head_config", "load_head"]

HEAD_TYPE = "gossamer_eagle"
HEAD_FOLDER = "eagle"
"""Within a model's directory: the head that comes with it."""
_SHAPE = ("vocab_size", "hidden_size")


@dataclass(frozen=True, slots=True)
class Joined:
    """Tensors of two sources: `names` are the first one's, all others the second's."""

    names: Collection[str]
    first: WeightSource
    second: WeightSource

    def read(self, name: str) -> Array:
        return self._of(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        return self._of(name).read_rows(name, start, stop)

    def release(self, name: str) -> None:
        self._of(name).release(name)

    def content_key(self) -> str:
        return f"{self.first.content_key()}-{self.second.content_key()}"

    def stored(self, name: str) -> tuple[str, int]:
        return self._of(name).stored(name)

    def read_codes(self, name: str, start: int, stop: int) -> Codes:
        return self._of(name).read_codes(name, start, stop)

    def scattered(self, name: str) -> Scattered | None:
        return self._of(name).scattered(name)

    def activation_scale(self, name: str) -> float:
        return self._of(name).activation_scale(name)

    def nonzeros(self, name: str) -> int | None:
        return self._of(name).nonzeros(name)

    def _of(self, name: str) -> WeightSource:
        return self.first if name in self.names else self.second


def find_head(head: str | None, target: Path) -> Path:
    """The head's directory: the one named, else the one that lies in the target's.

    Raises ConfigError where neither is there, CheckpointError for a name that is no model.
    """
    if head is not None:
        return resolve_model(head)
    if not (target / HEAD_FOLDER / "config.json").is_file():
        raise ConfigError(
            f"no draft head was named and {target} has none in {HEAD_FOLDER}/; train one with "
            "`python -m gossamer.compress.eagle MODEL --text FILES -o DIR` and name DIR as the model of the "
            "speculative configuration"
        )
    return target / HEAD_FOLDER


def load_head(directory: Path, target: Graph, source: WeightSource) -> tuple[Graph, WeightSource]:
    """The head's graph and where its weights come from. target: a graph that no pass has changed, source: its
    checkpoint.

    Raises CheckpointError where the directory holds no head, or one of another target.
    """
    config = read_config(directory)
    if config.get("model_type") != HEAD_TYPE:
        raise CheckpointError(
            f"{directory} holds a model of type {config.get('model_type')!r}, and a draft head is "
            f"{HEAD_TYPE!r}; a whole model drafts with the method draft_model"
        )
    ours = head_config(target)
    if wrong := [name for name in _SHAPE if config.get(name) != ours[name]]:
        raise CheckpointError(
            f"the draft head in {directory} was trained for {str(config.get('target'))[:80]!r}, with "
            + " and ".join(f"{name} {config.get(name)!r}" for name in wrong)
            + f"; {target.name} has "
            + " and ".join(f"{ours[name]}" for name in wrong)
            + ": train one for it with `python -m gossamer.compress.eagle`"
        )
    head, own = build_eagle(target), Checkpoint(directory)
    tensors = {leaf.name: leaf.shape for w in head.weights.values() for leaf in leaves(w.expr)}
    mine = {leaf.name for w in own_weights(head).values() for leaf in leaves(w.expr)}
    held = {name: own.info(name).shape for name in own.names()}
    check_tensors(head, {name: shape for name, shape in tensors.items() if name not in mine} | held)
    return head, Joined(mine, own, source)


def head_config(target: Graph) -> dict[str, Any]:
    """config.json of a head of this target."""
    return {
        "architectures": ["EagleHead"],
        "model_type": HEAD_TYPE,
        "target": target.name,
        "vocab_size": target.vocab,
        "hidden_size": target.hidden,
    }
