"""A model's quality as it is served, beside the torch reference, and against a reference model.

At most two models are in memory at a time. `reference_config` gives the usual reference: the same weights in
fp32, in torch where it is installed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gossamer import _native
from gossamer.checkpoint.hub import read_config, resolve_model
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.config import (
    DynamicShapes,
    EngineConfig,
    FlashAttention,
    HardwareKernels,
    MemoryReuse,
    MixedPrecision,
    ParallelComputing,
)
from gossamer.config.weight_formats import FLOATS
from gossamer.errors import ConfigError
from gossamer.quality.compare import Compared, Losses, compare, divergence, mean_error, score, text_scores
from gossamer.quality.report import Beside, Comparison, Noise, Quality
from gossamer.quality.scorer import ModelScorer, open_scorer
from gossamer.quality.tasks import TaskFile, run_tasks
from gossamer.quality.windows import (
    Document,
    Text,
    Window,
    first_windows,
    read_documents,
    tokens_hash,
    windows_of,
)
from gossamer.runtime.start import load_graph

__all__ = ["begin_token", "has_torch", "measure", "reference_config", "serving_config"]

Progress = Callable[[str, int, int], None]
_CHECKED = 4096  # tokens over which executions are held against each other
_CONTEXT = 2048  # where neither the user nor the model asks for less


def measure(
    config: EngineConfig,
    texts: Sequence[Text],
    *,
    reference: EngineConfig | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    beside: bool = False,
    tasks: Sequence[TaskFile] = (),
    progress: Progress = lambda what, done, total: None,
) -> Quality:
    """Perplexity and bits per byte of texts, and with a reference how far the model is from it.

    config: the model as it is served (limits on batches and KV memory are replaced); reference: another
    configuration or model of the same tokenizer. context: most tokens of a window (the model's, at most
    2048); stride: how far windows move (three quarters of the context); max_tokens: that are predicted in
    all, shared out fairly from the beginnings of the texts. beside: run the torch reference of the same
    formats over some of the tokens, too. tasks: files of questions (`gossamer.quality.tasks`).
    progress(what, done, of how much) may raise to stop.

    Raises ConfigError for what cannot be measured or compared, and GossamerError for models that cannot run.
    """
    began = time.monotonic()
    if not texts and not tasks:
        raise ConfigError(
            "nothing to measure with: name files of plain UTF-8 text that the model never saw, or of tasks"
        )
    if not texts and (reference is not None or beside):
        raise ConfigError("models are compared on text, and none is given; name some, or leave them out")
    graph, directory, _ = load_graph(replace(config, max_model_len=None))
    tokenizer = Tokenizer.load(directory)
    bos = begin_token(tokenizer)
    context = context or config.max_model_len or min(graph.max_positions, _CONTEXT)
    stride = stride or max(1, context * 3 // 4)
    documents = read_documents(texts, tokenizer, bos=bos, most=max_tokens)
    windows = [w for i, d in enumerate(documents) for w in windows_of(d, i, context, stride, bos)]
    if reference is not None:
        _check_tokenizer(reference, directory, documents, texts, max_tokens)
    comparison: Comparison | None = None
    next_to: Beside | None = None
    losses = Losses(np.empty(0), np.empty(0, np.int32))
    with ExitStack() as models:
        if reference is not None:
            with ExitStack() as others:
                other = others.enter_context(_opened(reference, context, progress))
                noise = _noise(other, windows, progress)
                model = models.enter_context(_opened(config, context, progress))
                what = f"{config.model} against its reference"
                found = compare(other, model, windows, _named(progress, what))
                comparison = _comparison(other, found, windows, documents, noise)
                losses = found.model
        else:
            model = models.enter_context(_opened(config, context, progress))
            losses = score(model, windows, _named(progress, config.model)) if windows else losses
        done = [each for file in tasks for each in run_tasks(file, model, tokenizer, progress)]
        ran = model.execution()
        if beside:
            next_to = _beside(model, windows, progress)
    each, total = text_scores(losses, windows, documents) if windows else ([], None)
    return Quality(
        execution=ran,
        context=context,
        stride=stride,
        bos=bos is not None,
        text_sha256=tokens_hash(documents),
        texts=tuple(each),
        total=total,
        reference=comparison,
        beside=next_to,
        tasks=tuple(done),
        seconds=round(time.monotonic() - began, 3),
    )


def has_torch() -> bool:
    """Whether the torch reference can run here."""
    return find_spec("torch") is not None


def begin_token(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer begins texts with; None where it adds none."""
    first = tokenizer.encode("a")[:1]
    return tokenizer.bos_id if first and first[0] == tokenizer.bos_id else None


def reference_config(model: str, config: EngineConfig) -> EngineConfig:
    """What `config` is compared to: a model with its weights in fp32 (what is stored quantized as the floats
    that it stands for), keys and values in fp32, run by torch where it is installed, else by the kernels."""
    plain = replace(
        config,
        model=model,
        revision=config.revision if model == config.model else None,
        quantization=None,
        mixed_precision=None,
        weight_formats=(("*", "f32"),),
        kv_dtype="f32",
        sparse_weights=None,
        weight_cache=False,
        hardware_kernels=HardwareKernels(),
        backend="cpu",
    )
    return _in_torch(plain) if has_torch() else plain


def serving_config(model: str, threads: int | None = None, **options: Any) -> EngineConfig:
    """How a directory is served where nothing else is said: matrices as they are stored, keys and values in
    bfloat16. options: further fields of EngineConfig. Raises CheckpointError."""
    stored = read_config(resolve_model(model))
    half = FLOATS.get(str(stored.get("torch_dtype") or stored.get("dtype")).removeprefix("torch."))
    return EngineConfig(
        model=model,
        mixed_precision=None if half is None else MixedPrecision(dtype=half),  # type: ignore[arg-type]
        parallel_computing=ParallelComputing(threads=threads),
        **options,
    )


def _in_torch(config: EngineConfig) -> EngineConfig:
    """The same model and formats on the torch reference."""
    return replace(
        config,
        backend="reference",
        hardware_kernels=HardwareKernels(),
        memory_reuse=MemoryReuse(),
        flash_attention=FlashAttention(),
        dynamic_shapes=DynamicShapes(),
    )


@contextmanager
def _opened(config: EngineConfig, context: int, progress: Progress) -> Iterator[ModelScorer]:
    scorer = open_scorer(config, context, _named(progress, f"loading {config.model}"))
    try:
        yield scorer
    finally:
        scorer.close()


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def _check_tokenizer(
    reference: EngineConfig,
    directory: Path,
    documents: Sequence[Document],
    texts: Sequence[Text],
    most: int | None,
) -> None:
    """Raises ConfigError where the reference reads the texts as other tokens."""
    _, other, _ = load_graph(replace(reference, max_model_len=None))
    if other == directory:
        return
    tokenizer = Tokenizer.load(other)
    bos = begin_token(tokenizer)
    theirs = read_documents(texts, tokenizer, bos=bos, most=most)
    for own, their in zip(documents, theirs, strict=True):
        if not np.array_equal(own.ids, their.ids):
            raise ConfigError(
                f"{reference.model} reads the text {own.name} as other tokens than {directory} does: their "
                "tokenizers differ, and only models of one can be compared; compare their bits per byte "
                "instead"
            )


def _noise(reference: ModelScorer, windows: Sequence[Window], progress: Progress) -> Noise | None:
    """The reference against itself: on the kernels where it runs in torch, else on those of another
    instruction set; None where there is neither."""
    config = reference.started.config
    if config.backend == "reference":
        config = replace(config, backend="cpu")
    else:
        others = [isa for isa in _native.isas() if isa != reference.started.isa]
        if not others:
            return None
        config = replace(config, hardware_kernels=HardwareKernels(isa=others[-1]))  # type: ignore[arg-type]
    some = first_windows(windows, _CHECKED)
    with _opened(config, reference.context, progress) as again:
        found = compare(reference, again, some, _named(progress, "the reference against itself"))
        return Noise(execution=again.execution(), divergence=divergence(found))


def _beside(model: ModelScorer, windows: Sequence[Window], progress: Progress) -> Beside:
    some = first_windows(windows, _CHECKED)
    with _opened(_in_torch(model.started.config), model.context, progress) as torch:
        found = compare(torch, model, some, _named(progress, "the torch reference beside"))
        return Beside(
            execution=torch.execution(),
            perplexity=math.exp(found.reference.mean),
            served=math.exp(found.model.mean),
            divergence=divergence(found),
        )


def _comparison(
    reference: ModelScorer,
    found: Compared,
    windows: Sequence[Window],
    documents: Sequence[Document],
    noise: Noise | None,
) -> Comparison:
    more = found.model.nats - found.reference.nats
    ratio = math.exp(float(more.mean()))
    error = mean_error(more, found.model.windows)
    return Comparison(
        execution=reference.execution(),
        score=text_scores(found.reference, windows, documents)[1],
        ratio=ratio,
        ratio_error=None if error is None else ratio * error,
        divergence=divergence(found),
        noise=noise,
    )
