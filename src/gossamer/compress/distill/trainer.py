"""One run of training: a student, its objective, an optimizer, and where they stand.

Weights and sums are float32, matrix products bfloat16 where asked for. All chance comes from the seed and
the step's number, and a checkpoint holds all the rest, so that a run that was killed ends with the bits of
one that was not (on as many threads).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.backends.reference import ReferenceModel
from gossamer.compress.distill.forward import Forward
from gossamer.compress.distill.objective import Objective
from gossamer.compress.distill.optim import Zeros, optimizers, rate
from gossamer.compress.text import Windows
from gossamer.config.compression.train import Training
from gossamer.errors import CheckpointError, ConfigError, GossamerError

__all__ = ["CHECKPOINT", "Trainer"]

CHECKPOINT = "training.pt"
_FREE = ("save_seconds", "checkpointing")  # change no number
_CLIP = 1.0  # of the gradients' norm


class Trainer:
    """Trains a model in place. losses: name -> value of every step so far."""

    def __init__(
        self,
        model: ReferenceModel,
        objective: Objective,
        windows: Windows,
        config: Training,
        *,
        key: str = "",
    ) -> None:
        """windows: of config.context tokens; key: of what else the run depends on (models, text), which a
        checkpoint must agree with. Weights of matrices that are zero stay zero."""
        self.model, self.objective, self.windows, self.config, self.key = (
            model, objective, windows, config, key,
        )  # fmt: skip
        self.step = 0
        self.losses: dict[str, list[float]] = {}
        self.zeros = Zeros(model)
        self._forward = Forward(model, objective.taps, checkpointing=config.checkpointing)
        self._optimizers = optimizers(model, objective, config)
        self._trained = [*model.parameters(), *objective.parameters()]

    def train_step(self) -> None:
        """One step of the optimizer over the next batch * accumulate windows.

        Raises GossamerError for a loss or a gradient that is not finite; nothing was changed then.
        """
        config = self.config
        sums: dict[str, float] = {}
        for p in self._trained:
            p.grad = None
        for part in range(config.accumulate):
            position = (self.step * config.accumulate + part) * config.batch
            ids_BL = self.windows.batch(position, config.batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                out = self._forward(torch.from_numpy(ids_BL.astype(np.int64)))
                loss, parts = self.objective(position, ids_BL, out)
            del out
            self._check("loss", float(loss.detach()))
            (loss / config.accumulate).backward()
            for name, value in {"loss": float(loss.detach()), **parts}.items():
                sums[name] = sums.get(name, 0.0) + value / config.accumulate
        self.zeros.gradients()
        norm = torch.nn.utils.clip_grad_norm_(self._trained, _CLIP)
        self._check("norm of the gradients", float(norm))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(config, self.step)
            optimizer.step()
        self.zeros.weights()
        for name, value in sums.items():
            self.losses.setdefault(name, []).append(value)
        self.step += 1

    def run(
        self,
        directory: Path,
        *,
        on_step: Callable[[Trainer], None] = lambda trainer: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Trains to the end (True) or until stop() says so, with checkpoints in the directory."""
        saved = time.monotonic()
        while self.step < self.config.steps and not stop():
            self.train_step()
            on_step(self)
            if time.monotonic() - saved > self.config.save_seconds:
                self.save(directory)
                saved = time.monotonic()
        self.save(directory)
        return self.step >= self.config.steps

    def save(self, directory: Path) -> None:
        """Writes all that `resume` needs aside, then renames it: there is always a whole one.

        Raises CheckpointError where the disk is full; the last checkpoint stays.
        """
        path, aside = directory / CHECKPOINT, directory / f".{CHECKPOINT}.part"
        state = {
            "config": asdict(self.config),
            "key": self.key,
            "step": self.step,
            "losses": self.losses,
            "model": {name: p.detach() for name, p in self.model.named_parameters()},
            "beside": {name: p.detach() for name, p in self.objective.named_parameters()},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        try:
            with aside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except (OSError, RuntimeError) as cause:  # torch's writer says RuntimeError for a full disk
            raise CheckpointError(
                f"cannot write the checkpoint {path}: {cause}; free some space and start "
                "again: the last one stays"
            ) from None
        finally:
            aside.unlink(missing_ok=True)

    def resume(self, directory: Path) -> bool:
        """Goes on where the directory's checkpoint stands; False where there is none.

        Raises ConfigError for a run with another config, models or text, CheckpointError for a damaged file.
        """
        path = directory / CHECKPOINT
        if not path.exists():
            return False
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            config, key, step = dict(saved["config"]), saved["key"], int(saved["step"])
        except Exception as cause:
            raise CheckpointError(f"cannot resume from {path}: {cause}; remove it to begin anew") from None
        for name, value in asdict(self.config).items():
            if name not in _FREE and config.get(name) != value:
                raise ConfigError(
                    f"{path} was trained with {name} {config.get(name)!r}, not {value!r}; go on with the "
                    "same, or remove it to begin anew"
                )
        if key != self.key:
            raise ConfigError(
                f"{path} is of another model, teacher or text; go on with the same, or remove it to begin "
                "anew"
            )
        self._take(saved)
        self.step = step
        return True

    def _take(self, saved: dict[str, Any]) -> None:
        self.losses = saved["losses"]
        for module, values in ((self.model, saved["model"]), (self.objective, saved["beside"])):
            with torch.no_grad():
                for name, p in module.named_parameters():
                    p.copy_(values[name])
        for optimizer, state in zip(self._optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    def _check(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise GossamerError(
                f"the {what} is {value} in step {self.step + 1} of {self.config.steps}: training came apart; "
                f"lower lr (it is {self.config.lr:g}) or raise warmup (it is {self.config.warmup:g}). "
                "The last checkpoint stays"
            )
