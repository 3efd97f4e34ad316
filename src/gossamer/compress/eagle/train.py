"""Trains a draft head for a model (EAGLE: Li et al. 2024, arXiv 2401.15077).

graph/families/eagle.py says what a head computes. The target runs over text; the head learns its features
(smooth L1, after the final norm) and its distribution (cross entropy against the target's own). A second
pass replaces half of the features by the head's own guesses (scheduled sampling: Bengio et al. 2015), since
further drafts stand on those. A run that was killed goes on from its last checkpoint when it is started
again, and ends with the same bits.

Shape legend: B windows, L tokens of each, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.backends.reference import ReferenceModel, export_tensors
from gossamer.checkpoint.heads import head_config
from gossamer.checkpoint.safetensors_writer import write_safetensors
from gossamer.checkpoint.weights import WeightSource
from gossamer.compress.text import Windows
from gossamer.errors import CheckpointError, ConfigError
from gossamer.graph.families.eagle import FEATURES, HIDDEN, build_eagle, own_weights, with_features
from gossamer.graph.ir import Graph
from gossamer.graph.ops import get_op
from gossamer.graph.ops.attention import KVState, SpanRows
from gossamer.graph.weights import leaves

__all__ = ["EagleTrainer", "Losses", "Recipe", "forward", "new_head", "shifted", "write_head"]

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a run's numbers depend on."""

    steps: int = 2000
    """Optimizer steps."""
    batch: int = 8
    """Windows per step."""
    context: int = 256
    """Tokens per window."""
    lr: float = 1e-3
    """AdamW's highest learning rate: reached after `warmup` of the steps, then a cosine to a hundredth."""
    warmup: float = 0.03
    weight_decay: float = 0.01
    regression: float = 0.1
    """Weight of the smooth L1 loss between features; the cross entropy's is 1."""
    own: float = 0.5
    """Share of the second pass's features that are the head's own guesses (0: no second pass)."""
    seed: int = 1
    bf16: bool = False
    """Matrix products in bfloat16 (torch's autocast), weights in float32."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("context", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; {least} or more is right")
        if not 0 <= self.own <= 1:
            raise ConfigError(f"own is {self.own}; a share from 0 to 1 is right")
        if self.lr <= 0:
            raise ConfigError(f"lr is {self.lr}; a number above 0 is right")

    def factor(self, step: int) -> float:
        """Share of the highest learning rate in this step."""
        warm = max(1, round(self.steps * self.warmup))
        if step < warm:
            return (step + 1) / warm
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


@dataclass(slots=True)
class Losses:
    """Of every step so far, one number for each pass: features, and tokens (nats)."""

    features: list[list[float]] = field(default_factory=list)
    tokens: list[list[float]] = field(default_factory=list)


def new_head(target: ReferenceModel, seed: int) -> ReferenceModel:
    """An untrained head of a target (whose graph has its features among its outputs). Shared weights are the
    target's and frozen; the layer begins as the target's last one, the projections as identities."""
    graph = build_eagle(target.graph)
    head = ReferenceModel(graph)
    generator = torch.Generator().manual_seed(seed)
    own, last = own_weights(graph), f"layers.{target.graph.layers - 1}."
    with torch.no_grad():
        for name, weight in head.named_parameters():
            if name not in own:
                weight.copy_(target.weight(name))
                weight.requires_grad_(False)
            elif name.startswith("layers.0."):
                weight.copy_(target.weight(last + name.removeprefix("layers.0.")))
            elif weight.ndim == 1:
                weight.zero_()
            else:
                noise = torch.randn(weight.shape, generator=generator) * (0.1 / len(weight) ** 0.5)
                weight.copy_(torch.eye(len(weight)) + noise)
    return head


class EagleTrainer:
    """One run: target, head, optimizer, text, and where they stand."""

    def __init__(self, graph: Graph, source: WeightSource, windows: Windows, recipe: Recipe) -> None:
        """graph: the target's, before any pass; source: its checkpoint."""
        self.recipe, self.windows = recipe, windows
        self.target = ReferenceModel.load(with_features(graph), source).requires_grad_(False)
        self.head = new_head(self.target, recipe.seed)
        self.step = 0
        self.losses = Losses()
        trained = [(name, p) for name, p in self.head.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for _, p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for _, p in trained if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=recipe.lr,
            betas=(0.9, 0.95),
        )
        self._trained = [p for _, p in trained]

    def train_step(self) -> None:
        """One optimizer step over the next `batch` windows."""
        recipe = self.recipe
        ids_BL = torch.from_numpy(self.windows.batch(self.step * recipe.batch, recipe.batch).astype(np.int64))
        # All chance comes from the seed and the step's number, so that a resumed run repeats it.
        chance = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            features, tokens = self._losses(ids_BL, chance)
        loss = tokens.sum() + recipe.regression * features.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.factor(self.step)
        self.optimizer.step()
        for kept, value in zip((self.losses.features, self.losses.tokens), (features, tokens), strict=True):
            kept.append([float(v) for v in value.detach()])
        self.step += 1

    def _losses(self, ids_BL: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        """Of the features and of the tokens, each of every pass."""
        recipe = self.recipe
        with torch.no_grad():
            true = forward(self.target, ids_BL)
            probs = true["logits"].float().softmax(-1)
        normed = self._normed(true[HIDDEN])
        losses: list[tuple[Tensor, Tensor]] = []
        given = true[HIDDEN].float()
        for _ in range(2 if recipe.own else 1):
            out = forward(self.head, ids_BL, shifted(given, ids_BL))
            regression = F.smooth_l1_loss(self._normed(out[HIDDEN]), normed)
            losses.append((regression, F.cross_entropy(out["logits"].float(), probs)))
            guessed = torch.rand(ids_BL.numel(), 1, generator=chance) < recipe.own
            given = torch.where(guessed, out[HIDDEN].float(), given)
        features, tokens = zip(*losses, strict=True)
        return torch.stack(features), torch.stack(tokens)

    def _normed(self, hidden: Tensor) -> Tensor:
        """After the final norm, where features have the size that the logits see."""
        node = next(n for n in self.head.graph.nodes if FEATURES in n.inputs)
        weights = [self.head.weight(w) for w in node.weights]
        return get_op(node.op).reference(node.attrs, [hidden.float()], weights, KVState(()))[0]

    def save(self, directory: Path) -> None:
        """Writes everything that `resume` needs aside, then renames it: there is always a whole one."""
        trained = {n: p.detach() for n, p in self.head.named_parameters() if p.requires_grad}
        aside = directory / f".{CHECKPOINT}.part"
        torch.save(
            {
                "recipe": asdict(self.recipe),
                "step": self.step,
                "losses": asdict(self.losses),
                "head": trained,
                "optimizer": self.optimizer.state_dict(),
            },
            aside,
        )
        os.replace(aside, directory / CHECKPOINT)

    def resume(self, directory: Path) -> bool:
        """Goes on where the directory's checkpoint stands; False where there is none.

        Raises ConfigError for another recipe or target, CheckpointError for a damaged file.
        """
        path = directory / CHECKPOINT
        if not path.exists():
            return False
        try:
            saved = torch.load(path, weights_only=True)
            recipe, step, losses = saved["recipe"], int(saved["step"]), Losses(**saved["losses"])
        except Exception as cause:
            raise CheckpointError(f"cannot resume from {path}: {cause}; remove it to begin anew") from None
        for own in fields(Recipe):
            if recipe.get(own.name) != getattr(self.recipe, own.name):
                raise ConfigError(
                    f"{path} was trained with {own.name} {recipe.get(own.name)!r}, not "
                    f"{getattr(self.recipe, own.name)!r}; resume with the same, or choose another directory"
                )
        own_shapes = {n: p.shape for n, p in self.head.named_parameters() if p.requires_grad}
        if {n: p.shape for n, p in saved["head"].items()} != own_shapes:
            raise ConfigError(f"{path} is of a head for another model; choose another directory")
        self.head.load_state_dict(saved["head"], strict=False)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.losses = step, losses
        return True

    def run(
        self,
        directory: Path,
        *,
        save_seconds: float = 60.0,
        on_step: Callable[[EagleTrainer], None] = lambda trainer: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Trains to the end (True) or until stop() says so, saving every so many seconds and then."""
        saved = time.monotonic()
        while self.step < self.recipe.steps and not stop():
            self.train_step()
            on_step(self)
            if time.monotonic() - saved > save_seconds:
                self.save(directory)
                saved = time.monotonic()
        self.save(directory)
        return self.step >= self.recipe.steps


def shifted(features: Tensor, ids_BL: Tensor) -> Tensor:
    """What each token takes [B * L, D]: the feature of the token before it, zeros for the first."""
    f_BLD = features.float().view(*ids_BL.shape, -1)
    return F.pad(f_BLD[:, :-1], (0, 0, 1, 0)).flatten(0, 1)


def forward(model: ReferenceModel, ids_BL: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
    """Logits [B * L, V] and hidden [B * L, D] of windows from position 0."""
    batch, length = ids_BL.shape
    rows = torch.arange(batch * length)
    spans = tuple(SpanRows(b, b * length, length, 0) for b in range(batch))
    inputs = None if features is None else {FEATURES: features}
    out: dict[str, Tensor] = model(
        ids_BL.flatten(), rows % length, rows, KVState(spans), ("logits", HIDDEN), inputs
    )
    return out


def write_head(
    head: ReferenceModel, target: Graph, directory: Path, facts: dict[str, Any] | None = None
) -> None:
    """Writes config.json and model.safetensors (bfloat16) of a head. facts: more for config.json."""
    names = {leaf.name for w in own_weights(head.graph).values() for leaf in leaves(w.expr)}
    tensors = {
        name: array.astype(ml_dtypes.bfloat16)
        for name, array in export_tensors(head).items()
        if name in names
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    config = head_config(target) | ({"training": facts} if facts else {})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
