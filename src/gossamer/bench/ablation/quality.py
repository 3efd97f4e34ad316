"""Quality of settings on the user's text: perplexity and KL to the fp32 model, each format once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gossamer.bench.ablation.verdict import exact, figure
from gossamer.bench.ledger import Effect, Figure
from gossamer.checkpoint.hub import resolve_model
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.config import EngineConfig
from gossamer.quality.measure import begin_token, measure, reference_config
from gossamer.quality.windows import Text, read_documents

__all__ = ["Qualities", "Score", "quality_effects", "quality_figures"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """kl: nats per token to the fp32 model; ratio: perplexity by that of the fp32 model, error: the standard
    error of its logarithm (None where there is but one window, which says nothing of it)."""

    kl: float
    perplexity: float
    ratio: float
    error: float | None


class Qualities:
    """Measures on `texts`, at most `tokens` of them, against `model` in fp32; what it has it keeps. Raises
    GossamerError for a model without a tokenizer, and for texts that nothing can be measured on."""

    def __init__(self, model: str, texts: Sequence[Text], tokens: int) -> None:
        if texts:  # said now, and not in the minutes that come
            tokenizer = Tokenizer.load(resolve_model(model))
            read_documents(texts, tokenizer, bos=begin_token(tokenizer), most=tokens)
        self._model, self._texts, self._tokens = model, texts, tokens
        self._found: dict[tuple[object, ...], Score] = {}

    def __bool__(self) -> bool:
        return bool(self._texts)

    def score(self, config: EngineConfig, progress: Progress) -> Score:
        """Of a configuration, or of another model in it. Raises GossamerError."""
        key = (
            config.model,
            config.quantization,
            config.mixed_precision,
            config.weight_formats,
            config.kv_dtype,
            config.hardware_kernels,
        )
        if key not in self._found:
            reference = reference_config(self._model, config)
            found = measure(
                config, self._texts, reference=reference, max_tokens=self._tokens, progress=progress
            )
            compared, total = found.reference, found.total
            assert compared is not None and total is not None
            error = compared.ratio_error
            self._found[key] = Score(
                kl=compared.divergence.kl_mean,
                perplexity=total.perplexity,
                ratio=compared.ratio,
                error=None if error is None else error / compared.ratio,
            )
        return self._found[key]


def quality_figures(score: Score) -> dict[str, Figure]:
    """The figures of a side."""
    return {"kl": figure([score.kl]), "perplexity": figure([score.perplexity])}


def quality_effects(off: Score, on: Score) -> tuple[Effect, ...]:
    """What became of perplexity. KL has figures alone: the baseline's is rounding, and a ratio to it says
    nothing."""
    if off.error is None or on.error is None:
        error = abs(math.log(on.ratio / off.ratio))  # as wide as need be to leave it open
    else:
        error = math.hypot(off.error, on.error)
    return (exact("perplexity", off.ratio, on.ratio, error=error),)
