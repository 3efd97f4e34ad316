"""`gossamer eval`: what a model is worth as it is served."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.options import flag
from gossamer.cli.show import emit_json
from gossamer.cli.show_quality import show_certificate, show_quality
from gossamer.errors import CheckpointError, ConfigError, DependencyError

if TYPE_CHECKING:
    from gossamer.config import EngineConfig
    from gossamer.quality.certificate import Certificate

__all__ = ["evaluate"]

_WORK, _AGAINST = "What to measure on", "What to compare with"


def evaluate(
    engine: EngineFlags,
    text: Annotated[
        list[Path] | None,
        flag(
            "--text",
            panel=_WORK,
            metavar="FILE",
            help="Text that the model never saw, plain UTF-8 or .xz of it. Repeatable.",
        ),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        flag(
            "--tasks",
            panel=_WORK,
            metavar="JSONL",
            help='Questions: {"context", "choices", "answer"} or {"prompt", "answer"} a line. Repeatable.',
        ),
    ] = None,
    context: Annotated[
        int | None,
        flag(
            "--context",
            panel=_WORK,
            metavar="TOKENS",
            help="Most tokens of a window; the model's context, at most 2048, if not given.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        flag(
            "--stride",
            panel=_WORK,
            metavar="TOKENS",
            help="How far windows move: every token but a text's first has at least context - stride before "
            "it. Three quarters of the context if not given.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        flag(
            "--max-tokens",
            "-n",
            panel=_WORK,
            metavar="N",
            help="Most tokens to predict in all, shared out evenly over the beginnings of the texts.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        flag(
            "--reference",
            panel=_AGAINST,
            metavar="MODEL|fp32",
            help="Say how far this is from another model in fp32 (the one that it was made from), or from "
            "itself in fp32, where weights that are stored quantized keep their values.",
        ),
    ] = None,
    beside: Annotated[
        bool | None,
        flag(
            "--beside/--no-beside",
            panel=_AGAINST,
            show_default=False,
            help="Run the torch reference of the same formats over some of the tokens, too; done where torch "
            "is installed.",
        ),
    ] = None,
    certificate: Annotated[
        bool, flag("--certificate", help="Show what the model's own certificate says; measure nothing.")
    ] = False,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity, divergence and tasks with the kernels that serve the model.

    Flags that say how requests are batched change no figure.
    """
    if certificate:
        found = _certificate(engine)
        if json:
            emit_json(asdict(found))
        else:
            show_certificate(found)
        return
    from gossamer.progress import work_bar
    from gossamer.quality.measure import has_torch, measure, reference_config
    from gossamer.quality.tasks import read_tasks
    from gossamer.quality.windows import read_texts

    for name, value, least in (
        ("--context", context, 2),
        ("--stride", stride, 1),
        ("--max-tokens", max_tokens, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} {value} must be at least {least}")
    config = engine.config()
    if not text and not tasks:
        raise ConfigError(
            "nothing to measure with: pass --text FILE (text that the model never saw, plain UTF-8 or .xz; "
            "repeatable), or --tasks FILE"
        )
    if not text and (reference is not None or beside):
        raise ConfigError(
            f"{'--beside' if reference is None else '--reference'} compares on text; pass --text FILE"
        )
    if beside and config.backend == "reference":
        raise ConfigError(
            "--beside puts the torch reference beside the kernels; leave out --backend reference"
        )
    if beside and not has_torch():
        raise DependencyError("--beside needs torch; install it with: pip install 'gossamer[torch]'")
    if beside is None:
        beside = bool(text) and config.backend == "cpu" and has_torch()
    other = None
    if reference is not None:
        other = reference_config(config.model if reference == "fp32" else reference, config)
    texts, questions = read_texts(text or ()), [read_tasks(path) for path in tasks or ()]
    with work_bar(sys.stderr.isatty()) as progress:
        quality = measure(
            config,
            texts,
            reference=other,
            context=context,
            stride=stride,
            max_tokens=max_tokens,
            beside=beside,
            tasks=questions,
            progress=progress,
        )
    if json:
        emit_json(asdict(quality))
    else:
        show_quality(quality, made_from=_original(config))


def _original(config: EngineConfig) -> str | None:
    """The model that this one was made from, where a certificate says so."""
    from gossamer.checkpoint.hub import resolve_model
    from gossamer.quality.certificate import read_certificate

    with contextlib.suppress(CheckpointError):  # it is only for a hint
        found = read_certificate(resolve_model(config.model, config.revision))
        return None if found is None else found.original.name
    return None


def _certificate(engine: EngineFlags) -> Certificate:
    from gossamer.checkpoint.hub import resolve_model
    from gossamer.quality.certificate import CERTIFICATE, read_certificate

    model = engine.model_flag or engine.model
    directory = resolve_model(model or engine.config().model, engine.revision)
    found = read_certificate(directory)
    if found is None:
        raise CheckpointError(
            f"there is no {CERTIFICATE} in {directory}: gossamer compress writes one; --text FILE measures "
            "the model now"
        )
    return found
