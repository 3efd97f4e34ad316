"""Training that repairs: recovery of a pruned model, distillation from a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gossamer.config.compression.checks import check_choice, check_range
from gossamer.errors import ConfigError

__all__ = ["Distil", "Recover"]

Loss = Literal["ce", "forward_kl", "reverse_kl", "js"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What all training shares. A step of the optimizer sees batch * accumulate windows of context tokens."""

    steps: int = 500
    batch: int = 8
    accumulate: int = 1
    """Gradients of so many batches are summed before a step."""
    context: int = 256
    lr: float = 1e-3
    warmup: float = 0.05
    """Share of the steps; then a cosine down to `final` of the peak."""
    final: float = 0.1
    weight_decay: float = 0.1
    """Of matrices."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon is for the matrices of the layers: more work per step, and further for as many tokens."""
    bf16: bool = True
    """Matrix products in bfloat16; weights and sums stay float32."""
    checkpointing: bool = False
    """Activations of layers are computed again rather than kept: less memory, a third more time."""
    save_seconds: float = 60.0
    """Between checkpoints."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, 10**8), ("batch", 1, 2**16), ("accumulate", 1, 2**16), ("context", 2, 2**20),
            ("lr", 1e-9, 10.0), ("warmup", 0.0, 1.0), ("final", 0.0, 1.0), ("weight_decay", 0.0, 10.0),
            ("save_seconds", 0.1, 86400.0),
        ):  # fmt: skip
            check_range(name, getattr(self, name), low, high)
        check_choice("optimizer", self.optimizer, ("adamw", "muon"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recover(Training):
    """More training of the model itself on the recipe's text; weights that are zero stay zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distil(Training):
    """The step's model is the student, and learns to predict what the teacher predicts."""

    teacher: str | None = None
    """A directory or hub id; None: the model that the recipe began with."""
    student: str | None = None
    """A config.json whose model begins at random instead of the step's model."""
    loss: Loss = "forward_kl"
    """Divergence from the teacher's predictions; "ce": only the text is learned from."""
    temperature: float = 1.0
    ce: float = 0.0
    """Weight of the cross entropy on the text, beside `loss` of weight 1."""
    hidden: float = 0.0
    """Weight of matching hidden states, through learned projections where widths differ."""
    attention: float = 0.0
    """Weight of matching what attention gives, through learned projections."""
    cache_logits: int = 0
    """Keep the teacher's so many largest logits of each token on disk (0: the teacher runs at every step)."""

    def __post_init__(self) -> None:
        Training.__post_init__(self)
        for name in ("teacher", "student"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"distil.{name} is {value!r}; a path in quotes is right, or leave it out")
        check_choice("distil.loss", self.loss, ("ce", "forward_kl", "reverse_kl", "js"))
        check_range("distil.temperature", self.temperature, 0.1, 100.0)
        for name in ("ce", "hidden", "attention"):
            check_range(f"distil.{name}", getattr(self, name), 0.0, 1e4)
        check_range("distil.cache_logits", self.cache_logits, 0, 2**16)
        if self.cache_logits and (self.hidden or self.attention):
            raise ConfigError(
                "distil.cache_logits keeps predictions alone, and distil.hidden and distil.attention match "
                "values inside the teacher; leave the one or the others at 0"
            )
