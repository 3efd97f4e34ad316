"""The engine's side of a step: what to compute (`StepPlan`), what came of it (`StepResult`), and the
`Executor` that does it. The engine knows no device: this page is all it says to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gossamer.engine.request import SamplingParams, TokenLogprob

__all__ = [
    "Executor",
    "ExecutorLimits",
    "Handle",
    "KVOp",
    "LastSampled",
    "RowResult",
    "Sampling",
    "Span",
    "StepPlan",
    "StepResult",
]

Handle = int


@dataclass(frozen=True, slots=True)
class LastSampled:
    """An input id not known yet: the newest token that the executor sampled for this sequence."""

    sequence: int


@dataclass(slots=True)
class Sampling:
    """What a row needs to become a token. Read when the plan is submitted, not later.

    seed: of the sequence (the noise is keyed by seed, output index and token id).
    output_ids: the tokens produced so far, those of this step excluded; their number is the first
    row's output index (a further row of the same span counts on).
    banned_ids: never to be chosen in this step (end tokens before min_tokens).
    """

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    banned_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence: a prefill chunk, a decode or a speculative draft.

    start: slot of the first token; token i goes to slot start + i, and its position is the same unless
    `parents` says otherwise. parents: for trees, offset of each token's parent within the span (-1: the
    token before the span); None is a chain. rows: offsets of the tokens whose logits are sampled.
    tables: per KV group, the sequence's page ids, long enough for every slot touched; live lists, read
    when the plan is submitted. sampling: needed where rows is not empty.
    """

    sequence: int
    tokens: Sequence[int | LastSampled]
    start: int
    rows: Sequence[int]
    tables: tuple[Sequence[int], ...]
    sampling: Sampling | None = None
    parents: tuple[int, ...] | None = None
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class KVOp:
    """A move of KV bytes, done in order before the step computes.

    "copy": the first `tokens` tokens of page `source` to page `target` of the same group.
    "out" / "in": page `source` to slot `target` of the slower tier, and back.
    """

    kind: Literal["copy", "out", "in"]
    group: int
    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. program: which of the executor's programs runs ("target", later "draft")."""

    spans: tuple[Span, ...]
    kv_ops: tuple[KVOp, ...] = ()
    program: str = "target"

    @property
    def tokens(self) -> int:
        """How many tokens the step computes."""
        return sum(len(s.tokens) for s in self.spans)


@dataclass(frozen=True, slots=True)
class RowResult:
    """One sampled row. bad: "" or why there is no token ("nan" among the logits, "empty": none allowed)."""

    token: int
    logprob: TokenLogprob | None = None
    bad: str = ""


@dataclass(frozen=True, slots=True)
class StepResult:
    """rows[i]: results of plan.spans[i], in the order of its rows. seconds: inside the program."""

    rows: list[list[RowResult]]
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorLimits:
    """What a step may be at most, and the KV memory there is.

    pages: per KV group, how many pages its pool has. page_size: tokens per page (of every group).
    """

    max_tokens: int
    max_rows: int
    max_spans: int
    page_size: int
    pages: tuple[int, ...]
    max_model_len: int
    vocab: int
    windows: tuple[int | None, ...] = field(default=(None,))


class Executor(Protocol):
    """Runs steps. Several may be in flight; they take effect in the order of submission."""

    @property
    def limits(self) -> ExecutorLimits:
        """Bounds that every plan must keep."""

    def submit(self, plan: StepPlan) -> Handle:
        """Takes a plan; its live lists may change once this returns."""

    def collect(self, handle: Handle) -> StepResult:
        """Waits for a submitted plan and gives its result; each handle once."""

    def close(self) -> None:
        """Gives memory and threads back. Idempotent."""
