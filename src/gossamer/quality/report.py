"""What a measurement of quality gives, as plain data that goes through JSON and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

__all__ = ["Beside", "Comparison", "Divergence", "Execution", "Noise", "Quality", "TaskScore", "TextScore"]

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """How well a text is predicted. tokens: that were predicted; bytes: of the text's UTF-8 that they stand
    for; loss: nats per token, error: its standard error, with windows as the units that chance drew
    (None: one alone); bits_per_byte compares across tokenizers, perplexity does not."""

    name: str
    tokens: Count
    bytes: Count
    loss: Positive
    error: Positive | None
    perplexity: Positive
    bits_per_byte: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """KL(reference || model) in nats per token over the whole vocabulary, and how often both find the same
    token likeliest. kl_error: standard error of the mean, as in `TextScore`."""

    tokens: Count
    kl_mean: Positive
    kl_error: Positive | None
    kl_p95: Positive
    kl_p99: Positive
    top1: Share


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What was run. backend: cpu or reference; formats: of matrices -> their share of all matrices' numbers;
    kernels: of the native backend's receipt, those that ran; stored: quantized formats that the checkpoint
    itself holds matrices in, whose values they have in any format."""

    model: str
    backend: str
    isa: str
    formats: dict[str, Share]
    kv: str
    kernels: tuple[str, ...]
    stored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The reference against itself in another but equivalent execution, over the first of the tokens: what is
    no larger than this is rounding, not loss."""

    execution: Execution
    divergence: Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The model against a reference model on the same tokens. score: of the reference; ratio: perplexity of
    the model by the reference's; ratio_error: its standard error, from differences window by window; noise:
    None where there is but one way to run the reference."""

    execution: Execution
    score: TextScore
    ratio: Positive
    ratio_error: Positive | None
    divergence: Divergence
    noise: Noise | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """The same model and formats in the torch reference, over the first of the tokens: what the kernels add.

    perplexity: of the reference; served: of the kernels over the same tokens; divergence: of the kernels from
    the reference."""

    execution: Execution
    perplexity: Positive
    served: Positive
    divergence: Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """A file of tasks. accuracy: share of right answers; normalised: the same with choices' log-probabilities
    divided by their bytes (None: exact match); chance: what guessing gives; error: standard error of
    accuracy."""

    name: str
    kind: str
    count: Count
    accuracy: Share
    normalised: Share | None
    chance: Share
    error: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A model's quality. context: most tokens of a window, stride: how far windows move; bos: whether every
    window begins with the model's begin token; text_sha256: of the tokens; seconds: all of it took."""

    execution: Execution
    context: Count
    stride: Count
    bos: bool
    text_sha256: str
    texts: tuple[TextScore, ...]
    total: TextScore | None
    reference: Comparison | None
    beside: Beside | None
    tasks: tuple[TaskScore, ...]
    seconds: Positive
