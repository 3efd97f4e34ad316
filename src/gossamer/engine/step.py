"""The engine's side of a step: what to compute (`StepPlan`), what came of it (`StepResult`), and the
`Executor` that does it. The engine knows no device: this page is all it says to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from gossamer.engine.request import SamplingParams, TokenLogprob

__all__ = [
    "Executor",
    "ExecutorLimits",
    "Handle",
    "HeadExecutor",
    "KVOp",
    "LastSampled",
    "Mask",
    "ProgramName",
    "RowResult",
    "Sampling",
    "Span",
    "StepPlan",
    "StepResult",
]

Handle = int
ProgramName = Literal["target", "draft"]


@dataclass(frozen=True, slots=True)
class LastSampled:
    """An input id not known yet: the newest token that the executor sampled for this sequence. The engine
    names by it the one row, without target or draft, that the sequence has in the step submitted before. If
    that row is bad, any id stands in, and nobody takes what comes of it."""

    sequence: int


Mask = bytes
"""Which tokens a row may take: ceil(vocab / 32) little-endian words, bit t % 32 of word t // 32 is t's."""


@dataclass(slots=True)
class Sampling:
    """What the rows of a span need to become tokens. Read when the plan is submitted, not later.

    seed: of the sequence (the noise is keyed by seed, output index and token id).
    output_ids: the tokens produced so far, those of this step excluded; their number is the output index of
    the first row that is sampled (has no target). Of a further one, the span's tokens after that row's, along
    its own path, count as produced too: they are in its history, and its output index is greater by their
    number.
    pending: 1 where one more has been produced that nobody knows yet, and the span begins with it as
    `LastSampled`: it counts for the output index. Never with penalties or masks, which go by what is known.
    banned_ids: not to be chosen where the output index is below min_tokens (the end tokens).
    masks: per row of the span, what a grammar allows there (None: everything); empty: no grammar.
    """

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    banned_ids: tuple[int, ...] = ()
    masks: Sequence[Mask | None] = ()
    pending: int = 0


@dataclass(slots=True)
class Span:
    """Consecutive tokens of one sequence: a prefill chunk, a decode or a speculative draft. Nobody changes it
    once made; it is not frozen, because that would double what planning a step costs.

    start: slot of the first token; token i goes to slot start + i, and its position is the same unless
    `parents` says otherwise. parents: for trees, offset of each token's parent within the span (-1: the
    token before the span); None is a chain.
    rows: offsets of the tokens whose logits are sampled, ascending. sampling: needed where there are rows.
    targets: per row, the token to take whatever the logits say, for its log-probability (a prompt's next
    token), or -1; empty: all are sampled.
    features: of a draft head, per token: whose hidden state it takes, as an offset in the span that its
    sequence had in the last step of `StepPlan.features`; -1: nobody's, zeros. Empty elsewhere.
    tables: per KV group, the sequence's page ids, long enough for every slot touched; live lists, read
    when the plan is submitted. -1 stands for a page below the group's window, which nobody reads.
    """

    sequence: int
    tokens: Sequence[int | LastSampled]
    start: int
    rows: Sequence[int]
    tables: tuple[Sequence[int], ...]
    sampling: Sampling | None = None
    targets: Sequence[int] = ()
    parents: tuple[int, ...] | None = None
    features: Sequence[int] = ()
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class KVOp:
    """A move of KV bytes of the plan's program, done in order before the step computes.

    "copy": `tokens` tokens of page `source` from `source_slot` on, to page `target` of the same group from
    `target_slot` on; within a page towards lower slots only. "out": page `source` to slot `target` of the
    slower tier; "in": slot `source` of it to page `target`; whole pages.
    """

    kind: Literal["copy", "out", "in"]
    group: int
    source: int
    target: int
    tokens: int
    source_slot: int = 0
    target_slot: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of one program: "target", the model served, or "draft", which speculates for it. Spans of a
    draft have its own tables; sequences have the same names in both.

    features: for a draft head, which takes each token with the hidden state of the one before, whose last
    step left them: "target" after tokens that the target has computed, "draft" after the head's own guesses.
    A program's hidden states are there until its next step, and nowhere else: a head that is not fed between
    two steps of the target has lost the first one's, and begins its sequence anew.
    """

    spans: tuple[Span, ...]
    kv_ops: tuple[KVOp, ...] = ()
    program: ProgramName = "target"
    features: ProgramName = "target"

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
    """rows[i]: results of plan.spans[i], in the order of its rows. seconds: inside the program;
    move_seconds: in the plan's kv_ops; padding: tokens that were computed on top of the plan's."""

    rows: list[list[RowResult]]
    seconds: float = 0.0
    move_seconds: float = 0.0
    padding: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorLimits:
    """What a step of a program may be at most, and the KV memory there is.

    pages: per KV group, how many pages its pool has. page_size: tokens per page (of every group).
    swap_pages: per KV group, slots of the slower tier (empty: there is none). windows: per KV group, how many
    tokens back attention sees, itself included (None: all). overlaps: whether it gains where a step is
    submitted before the one before it is collected, two at most in flight; its inputs may be `LastSampled`.
    """

    max_tokens: int
    max_rows: int
    max_spans: int
    page_size: int
    pages: tuple[int, ...]
    max_model_len: int
    vocab: int
    windows: tuple[int | None, ...] = field(default=(None,))
    swap_pages: tuple[int, ...] = ()
    overlaps: bool = False


class Executor(Protocol):
    """Runs steps. Several may be in flight; they take effect in the order of submission."""

    @property
    def limits(self) -> ExecutorLimits:
        """Bounds that every plan of the program "target" must keep."""

    @property
    def draft_limits(self) -> ExecutorLimits | None:
        """The same for the program "draft"; None where there is none."""

    def submit(self, plan: StepPlan) -> Handle:
        """Takes a plan; its live lists may change once this returns."""

    def collect(self, handle: Handle) -> StepResult:
        """Waits for a submitted plan and gives its result; each handle once, even where that raises."""

    def close(self) -> None:
        """Gives memory and threads back. Idempotent."""


@runtime_checkable
class HeadExecutor(Executor, Protocol):
    """An executor whose program "draft" is a head over the target's hidden states (EAGLE)."""

    def feature_slots(self, sequence: int) -> range:
        """Slots of the tokens whose hidden states the target's last step left; empty: none of them."""
