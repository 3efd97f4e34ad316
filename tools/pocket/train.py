"""Trains gossamer/pocket; resumable exactly, and always ends with a decayed learning rate.

The run ends at `--deadline` (or after `--minutes`). Writing minutes into `work/finish.request` moves the
end to so many minutes from now; `kill -STOP` and `-CONT` may pause it at any time. Started again with
the same `--work`, it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from data import Windows
from model import PocketConfig, build, hf_weights, initialize
from optim import Rates, optimizers_for, set_factor
from parallel import GradientWorkers, training_loss
from plot import loss_curve
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from schedule import Schedule

WORK = Path(__file__).parent / "work"


@dataclass(kw_only=True, slots=True)
class State:
    """What a run has done so far, apart from weights and optimizer moments."""

    step: int = 0
    tokens: int = 0
    position: int = 0  # windows consumed
    seconds: float = 0.0  # computing, pauses included, stops between two starts not
    train_loss: list[tuple[int, float]] = field(default_factory=list)  # (tokens, nats per token)
    valid_loss: list[tuple[int, float]] = field(default_factory=list)


class Trainer:
    """One run: a model, its optimizers, the data and the clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        torch.set_num_threads(1)
        self.config = PocketConfig(max_position_embeddings=args.context)
        saved = read_checkpoint(args.work / "checkpoint.pt", args)
        self.model = build(self.config, saved and saved["model"])
        if saved is None:
            initialize(self.model, self.config, args.seed)
        self.optimizers = optimizers_for(self.model, Rates(), muon=args.optimizer == "muon")
        self.schedule = Schedule(warmup_tokens=args.warmup_tokens)
        self.state = State()
        self.data = Windows(
            args.work / "tokens.u16", context=args.context, seed=args.seed, validation_tokens=args.validation
        )
        self.loss = training_loss(self.model, compiled=not args.no_compile)
        self.workers = GradientWorkers(
            self.model, self.config, self.data, self.loss, count=args.workers, compiled=not args.no_compile
        )
        self.speed = 0.0  # tokens per second, smoothed; 0 until measured
        self.steps_here = 0  # since this start
        self.stop = False
        if saved is not None:
            self.restore(saved)

    def step(self) -> float:
        """One optimizer step over `--batch` windows; returns its mean loss."""
        started, state, args = time.monotonic(), self.state, self.args
        loss = self.workers.gradients(state.position, args.batch, args.micro_batch)
        state.position += args.batch
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        set_factor(self.optimizers, self.schedule.factor(state.tokens))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        tokens = args.batch * args.context
        seconds = time.monotonic() - started
        state.step += 1
        state.tokens += tokens
        state.seconds += seconds
        self.steps_here += 1
        if self.steps_here > 2:  # the first ones compile
            self.speed = smoothed(self.speed, tokens / seconds)
        return loss

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the reserved tail of the training books."""
        losses = [
            float(self.loss(ids, targets)) for ids, targets in self.data.validation(self.args.micro_batch)
        ]
        return sum(losses) / len(losses)

    def expected_tokens(self, deadline: datetime) -> float:
        """How many more tokens fit before the deadline at the present speed."""
        return max(0.0, (deadline - datetime.now(UTC)).total_seconds()) * self.speed

    def save(self, path: Path) -> None:
        """Writes a checkpoint aside and renames it, so that there is always a whole one."""
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "config": self.config.to_hf(),
                "model": hf_weights(self.model),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "schedule": self.schedule.state(),
                "state": {name: getattr(self.state, name) for name in State.__dataclass_fields__},
                "speed": self.speed,
                "rng": torch.get_rng_state(),
                "args": {name: str(value) for name, value in vars(self.args).items()},
            },
            partial,
        )
        os.replace(partial, path)

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over everything `save` wrote but the weights, which the model was built with."""
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.schedule, self.state = Schedule(**saved["schedule"]), State(**saved["state"])
        self.speed = saved["speed"]
        torch.set_rng_state(saved["rng"])


def read_checkpoint(path: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint to go on from, if there is one.

    Raises:
        ValueError: if the data order would differ from the checkpoint's.
    """
    if not path.exists():
        return None
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    for name in ("seed", "context", "validation", "optimizer"):
        if saved["args"][name] != str(getattr(args, name)):
            raise ValueError(f"--{name} was {saved['args'][name]} in {path}; resume with the same value")
    return saved


def smoothed(speed: float, measured: float, *, weight: float = 0.02) -> float:
    """The harmonic running mean of a speed, 0 at first; no step counts as slower than a quarter of it.

    A pause is one very slow step, and must not look like a slow machine.
    """
    if not speed:
        return measured
    return 1.0 / ((1.0 - weight) / speed + weight / max(measured, speed / 4))


def requested_deadline(path: Path) -> datetime | None:
    """Takes a request to finish: the file holds the minutes left (8 if empty) and is removed."""
    if not path.exists():
        return None
    text = path.read_text().strip()
    path.unlink()
    return datetime.now(UTC) + timedelta(minutes=float(text or 8))


def run(trainer: Trainer, deadline: datetime, console: Console) -> None:
    """Trains until the decay is over (or a termination signal), saving and plotting on the way."""
    args, state = trainer.args, trainer.state
    last_step = state.step + args.stop_after if args.stop_after else None
    checkpoint, begun, saved_at = args.work / "checkpoint.pt", datetime.now(UTC), time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=False
    )
    with bar:
        task = bar.add_task("training", total=(deadline - begun).total_seconds())
        while not (trainer.schedule.finished or trainer.stop or state.step == last_step):
            loss = trainer.step()
            deadline = requested_deadline(args.work / "finish.request") or deadline
            step_tokens = args.batch * args.context
            expected = trainer.expected_tokens(deadline)
            if trainer.speed and trainer.schedule.due(tokens_seen=state.tokens, tokens_expected=expected):
                trainer.schedule.begin_decay()
            trainer.schedule.advance(step_tokens=step_tokens, tokens_expected=expected)
            state.train_loss.append((state.tokens, loss))
            if state.step % args.validate_every == 0 or trainer.schedule.finished:
                state.valid_loss.append((state.tokens, trainer.validate()))
                loss_curve(args.work / "loss.png", state.train_loss, state.valid_loss)
            if time.monotonic() - saved_at > args.save_minutes * 60:
                trainer.save(checkpoint)
                saved_at = time.monotonic()
            line = describe(trainer, loss, deadline)
            bar.update(
                task,
                description=line,
                completed=(datetime.now(UTC) - begun).total_seconds(),
                total=(deadline - begun).total_seconds(),
            )
            if not console.is_terminal and (state.step % 20 == 0 or state.step < 4):
                print(line, file=sys.stderr, flush=True)
    trainer.save(checkpoint)
    if trainer.schedule.finished:
        facts = {"step": state.step, "tokens": state.tokens}
        (args.work / "finished.json").write_text(json.dumps(facts) + "\n")


def describe(trainer: Trainer, loss: float, deadline: datetime) -> str:
    """One line on where the run stands."""
    state, schedule = trainer.state, trainer.schedule
    valid = f" valid {state.valid_loss[-1][1]:.3f}" if state.valid_loss else ""
    progress = schedule.decay_progress
    phase = "constant" if progress is None else f"decay {progress:.0%}"
    now = f"{datetime.now(UTC):%H:%M:%S}"
    return (
        f"{now} step {state.step} {state.tokens / 1e6:.2f} M tokens loss {loss:.3f}{valid} "
        f"{trainer.speed:.0f} tok/s {phase} (until {deadline:%H:%M} UTC)"
    )


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, help="tokens, checkpoint, log and picture live here"
    )
    parser.add_argument(
        "--minutes", type=float, default=90, help="time for the run, if no --deadline is given"
    )
    parser.add_argument("--deadline", help="end of the run, HH:MM UTC (the next such time)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="windows per optimizer step")
    parser.add_argument("--micro-batch", type=int, default=8, help="windows per forward and backward")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--warmup-tokens", type=int, default=500_000)
    parser.add_argument("--validation", type=int, default=65_536, help="tokens kept back, from the end")
    parser.add_argument("--validate-every", type=int, default=100, help="steps")
    parser.add_argument("--save-minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--stop-after", type=int, help="save and stop after so many steps, to be resumed")
    return parser.parse_args()


def end_of_run(args: argparse.Namespace) -> datetime:
    """The deadline in UTC."""
    now = datetime.now(UTC)
    if not args.deadline:
        return now + timedelta(minutes=args.minutes)
    at = datetime.strptime(args.deadline, "%H:%M").time()
    end = datetime.combine(now.date(), at, tzinfo=UTC)
    return end if end > now else end + timedelta(days=1)


def main() -> None:
    """Command line."""
    args = parse()
    console = Console(stderr=True)
    trainer = Trainer(args)
    if trainer.state.step:
        console.print(f"resuming at step {trainer.state.step}")

    def stop(*_: object) -> None:
        trainer.stop = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    run(trainer, end_of_run(args), console)


if __name__ == "__main__":
    main()
