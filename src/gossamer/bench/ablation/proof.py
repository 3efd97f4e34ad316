"""That a technique ran: what the receipts of two sides differ in, and what else shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gossamer.bench.ablation.mix import Measured
from gossamer.bench.ablation.worker import State
from gossamer.bench.ledger import Proof
from gossamer.config import EngineConfig

__all__ = ["Evidence", "prove"]

_MOST_KERNELS = 12
Kernels = Mapping[str, tuple[int, int]]
"""Kernel with its instruction set -> (calls, bytes of weights read)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One side of an arm. before, after: its rounds, which other arms may have used the engine for."""

    config: EngineConfig
    before: State
    after: State
    runs: Sequence[Measured]

    @property
    def kernels(self) -> Kernels:
        """What ran in these rounds."""
        found: dict[str, tuple[int, int]] = {}
        for old, new in zip(self.before.receipt, self.after.receipt, strict=True):
            calls = new.calls - old.calls
            if calls:
                name = f"{new.kernel} ({new.isa})"
                had = found.get(name, (0, 0))
                read = 0 if new.gb_s is None else calls * new.weight_bytes  # a lookup reads a row or two
                found[name] = (had[0] + calls, had[1] + read)
        return found

    @property
    def rows(self) -> int:
        """Tokens that went through the model, padding with them."""
        pairs = zip(self.before.receipt, self.after.receipt, strict=True)
        return max((new.rows - old.rows for old, new in pairs), default=0)


def prove(technique: str, off: Evidence, on: Evidence) -> tuple[Proof, str]:
    """The proof, and what is missing from it: "" where the technique is shown to have run."""
    fact, ran = _CHECKS[technique](off, on)
    tokens = _same_tokens(off, on)
    facts = (fact,) if tokens is None else (fact, tokens)
    return Proof(kernels=_differing(off.kernels, on.kernels), facts=facts), "" if ran else fact


def _differing(off: Kernels, on: Kernels) -> tuple[tuple[str, int, int], ...]:
    """Kernels of `on` that the other side has not, or ran another number of times; what reads most first."""
    fresh = {name: found for name, found in on.items() if name not in off}
    chosen = fresh or {name: found for name, found in on.items() if found != off[name]}
    ordered = sorted(chosen.items(), key=lambda item: (-item[1][1], -item[1][0], item[0]))
    return tuple((name, calls, size) for name, (calls, size) in ordered[:_MOST_KERNELS])


def _same_tokens(off: Evidence, on: Evidence) -> str | None:
    """How many requests had the same output on both sides."""
    pairs = [(a, b) for x, y in zip(off.runs, on.runs) for a, b in zip(x.tokens, y.tokens, strict=True)]
    if not pairs or any(run.forced for run in (*off.runs, *on.runs)):
        return None
    same = sum(a == b for a, b in pairs)
    if same == len(pairs):
        return f"the same tokens in all of {len(pairs)} requests"
    return f"the same tokens in {same} of {len(pairs)} requests"


Check = Callable[[Evidence, Evidence], tuple[str, bool]]


def _new_kernels(off: Evidence, on: Evidence) -> tuple[str, bool]:
    fresh = sorted(set(on.kernels) - set(off.kernels))
    return (f"{len(fresh)} kernels ran that the baseline has not" if fresh else "no kernel is another"), bool(
        fresh
    )


def _fused(off: Evidence, on: Evidence) -> tuple[str, bool]:
    a, b = (sum(calls for calls, _ in side.kernels.values()) for side in (off, on))
    kernels, ran = _new_kernels(off, on)
    return f"{b:,} instructions ran instead of {a:,}; {kernels}", ran


def _units(off: Evidence, on: Evidence) -> tuple[str, bool]:
    fusion = on.config.layer_fusion
    rows = 0 if fusion is None else fusion.rows
    units = on.after.units
    return f"{units} units over tiles of {rows} tokens, {off.after.units} before", units > off.after.units


def _padding(off: Evidence, on: Evidence) -> tuple[str, bool]:
    return f"{on.rows:,} tokens went through the model instead of {off.rows:,}", on.rows < off.rows


def _pages(off: Evidence, on: Evidence) -> tuple[str, bool]:
    a, b = (side.after for side in (off, on))
    text = f"{b.pages:,} pages of {b.page_tokens} tokens instead of {a.pages:,} slots of {a.page_tokens}"
    most = [max((run.running_most for run in side.runs), default=0) for side in (off, on)]
    text += f"; at most {most[1]} requests at once instead of {most[0]}" if all(most) else ""
    return text, b.page_tokens < a.page_tokens


def _arena(off: Evidence, on: Evidence) -> tuple[str, bool]:
    a, b = off.after.memory.arena, on.after.memory.arena
    return f"{b:,} bytes of arena instead of {a:,}", b < a


def _batching(off: Evidence, on: Evidence) -> tuple[str, bool]:
    if not on.runs:
        return "no round was run", False
    a, b = off.runs[-1], on.runs[-1]
    text = (
        f"{b.steps:,} steps with {b.running_mean:.1f} requests in them instead of {a.steps:,} with "
        f"{a.running_mean:.1f}"
    )
    return text, (a.steps, a.running_mean) != (b.steps, b.running_mean)


def _threads(off: Evidence, on: Evidence) -> tuple[str, bool]:
    a, b = off.after.threads, on.after.threads
    return f"{b} threads instead of {a}", b > a


def _isa(off: Evidence, on: Evidence) -> tuple[str, bool]:
    a, b = off.after.isa, on.after.isa
    return f"{b} kernels instead of {a} ones", a != b


def _drafts(off: Evidence, on: Evidence) -> tuple[str, bool]:
    drafted, accepted = (sum(getattr(run, name) for run in on.runs) for name in ("drafted", "accepted"))
    return f"{accepted:,} of {drafted:,} guessed tokens accepted", drafted > 0


def _model(off: Evidence, on: Evidence) -> tuple[str, bool]:
    a, b = off.after.memory.weights, on.after.memory.weights
    return f"{b:,} bytes of weights instead of {a:,}", a != b


_CHECKS: dict[str, Check] = {
    "quantization": _new_kernels,
    "mixed_precision": _new_kernels,
    "pruning": _new_kernels,
    "distillation": _model,
    "operator_fusion": _fused,
    "layer_fusion": _units,
    "dynamic_shapes": _padding,
    "paged_attention": _pages,
    "memory_reuse": _arena,
    "continuous_batching": _batching,
    "dynamic_batching": _batching,
    "parallel_computing": _threads,
    "hardware_kernels": _isa,
    "flash_attention": _new_kernels,
    "speculative_decoding": _drafts,
}
