"""The last act of a compression: what was lost is measured, and the certificate and the card are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.compress.recipe import Recipe, method_of
from gossamer.compress.step import Ids
from gossamer.quality.certificate import (
    Certificate,
    FileRecord,
    StepRecord,
    data_record,
    recipe_record,
    write_certificate,
)
from gossamer.quality.measure import measure, reference_config, serving_config
from gossamer.quality.model_card import write_model_card
from gossamer.quality.report import Quality
from gossamer.quality.sizes import model_record
from gossamer.quality.windows import Text

__all__ = ["certify", "measure_loss"]


def measure_loss(
    name: str,
    made: Path,
    held: Ids,
    called: str,
    *,
    threads: int,
    progress: Callable[[str, int, int], None],
) -> Quality | None:
    """What the model that was made loses on tokens that were held back, as it is served, against the original
    in fp32; None where no text was held back. name, called: of the original and the result."""
    if not len(held):
        return None
    config = serving_config(str(made), threads)
    text = Tokenizer.load(made).decode(held.tolist())
    quality = measure(
        config,
        [Text("held-out text", text)],
        reference=reference_config(name, config),
        beside=True,
        progress=progress,
    )
    return replace(quality, execution=replace(quality.execution, model=called))


def certify(
    name: str,
    original: Path,
    made: Path,
    recipe: Recipe,
    facts: Sequence[Mapping[str, Any]],
    files: Sequence[FileRecord],
    text: Ids,
    quality: Quality | None,
    called: str,
) -> None:
    """Writes certificate and card into the directory that was made. name: of the original, as it was given;
    facts: of each step; files, text: what calibrated and trained; called: the result's name on the card."""
    steps = [
        StepRecord(
            step=" ".join(method_of(step)),
            config=asdict(step),
            seconds=found["seconds"],
            facts={key: value for key, value in found.items() if key not in ("verb", "method", "seconds")},
        )
        for step, found in zip(recipe.steps, facts, strict=True)
    ]
    parsed = {"steps": [{"step": s.step} | s.config for s in steps], "data": _plain(asdict(recipe.data))}
    certificate = Certificate(
        original=model_record(original, name),
        compressed=model_record(made, called),
        recipe=recipe_record(recipe.name, recipe.text, parsed),
        data=data_record(files, text) if len(text) else None,
        seed=recipe.data.seed,
        steps=tuple(steps),
        quality=quality,
    )
    write_certificate(made, certificate)
    (made / "README.md").unlink(missing_ok=True)  # of an attempt that was interrupted here
    write_model_card(made, certificate, original=original, name=called)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: [p.name for p in value] if key == "text" else value for key, value in values.items()}
