"""Many conversations at once on the 8B shape: this engine, then transformers on the same requests.

Lengths are those of 256 requests of Azure's conversation trace of 2023 (`azure_conversations.csv`, drawn at
random; https://github.com/Azure/AzurePublicDataset, CC BY 4.0). Those that peers run too are a quarter as
long, so that slow ones come to an end; who does not within its time is known to be at least that slow.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cuda.measure import Bench, Line, Work
from benchmarks.cuda.model import Model
from benchmarks.cuda.shapes import shape_of
from benchmarks.cuda.transformers_peer import Ran, continuous, load, static
from gossamer.bench.trace import read_trace
from gossamer.bench.workload import Lengths
from gossamer.errors import ConfigError

__all__ = ["conversations", "open_serving", "serving", "static_cache", "transformers_batching"]

_TRACE = Path(__file__).with_name("azure_conversations.csv")
_SHAPE = "llama-3.1-8b"
_SHARED = 4  # what lengths are divided by where peers run them
_PAGE = 16
_CASE = "conversations at a quarter of their lengths, 8B, bf16"


def conversations(bench: Bench, divisor: int) -> Lengths:
    """(prompt, output) tokens of each request."""
    trace = read_trace(_TRACE)[: bench.some(256, 2)]
    divisor = bench.some(divisor, 100)
    return [(-(-a.input_len // divisor), -(-a.output_len // divisor)) for a in trace]


def open_serving(bench: Bench) -> tuple[Model, Work]:
    """A model with room for all conversations at their full lengths, and the work of the shared ones."""
    whole = conversations(bench, 1)
    shape = shape_of(_SHAPE, tiny=bench.tiny)
    token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * 2
    pages = sum(-(-(prompt + output) // _PAGE) + 1 for prompt, output in whole)
    model = Model(
        bench,
        _SHAPE,
        tokens=bench.some(8192, 64),
        sequences=len(whole),
        max_model_len=max(prompt + output for prompt, output in whole) + _PAGE,
        kv_bytes=pages * _PAGE * token,
    )
    _run(model, [(prompt, 4) for prompt, _ in conversations(bench, _SHARED)])  # compiles
    return model, Work(call=lambda: _run(model, conversations(bench, _SHARED)), steps=1)


def serving(bench: Bench) -> Iterator[Line]:
    """This engine alone, at both lengths: nothing is held against anything yet."""
    model, _ = open_serving(bench)
    for case, divisor in ((_CASE, _SHARED), ("conversations in full, 8B, bf16", 1)):
        lengths = conversations(bench, divisor)
        before = model.engine.engine.stats()
        began = time.perf_counter()
        tokens = _run(model, lengths)
        seconds = time.perf_counter() - began
        after = model.engine.engine.stats()
        yield Line(
            case=f"{len(lengths)} {case}",
            value=tokens / seconds,
            unit="tokens/s",
            detail={
                "seconds": seconds,
                "prompt_tokens": sum(prompt for prompt, _ in lengths),
                "output_tokens": tokens,
                "steps": after.steps - before.steps,
                "preemptions": after.preemptions - before.preemptions,
            },
        )
    yield model.memory_line()


def transformers_batching(bench: Bench) -> Iterator[Line]:
    """This engine over transformers' continuous batching."""
    ours, lengths = _ours(bench), conversations(bench, _SHARED)
    model = load(bench, _SHAPE)
    yield _ratio(ours, lengths, continuous(model, lengths, bench.some(90, 60)), "continuous batching", 2.0)


def static_cache(bench: Bench) -> Iterator[Line]:
    """This engine over transformers' `generate` with a static cache, compiled, in batches of 64."""
    ours, lengths = _ours(bench), conversations(bench, _SHARED)
    model = load(bench, _SHAPE)
    ran = static(model, lengths, bench.some(90, 60), batch=bench.some(64, 2))
    yield _ratio(ours, lengths, ran, "compiled generate with a static cache", 5.0)


def _run(model: Model, lengths: Lengths) -> int:
    """All requests from the start on, to their end; how many tokens came."""
    for prompt, output in lengths:
        model.submit(prompt, output)
    return model.run()


def _ours(bench: Bench) -> float:
    """Tokens a second that the row "serving" reached on the shared requests. Raises ConfigError where it did
    not run."""
    for line in bench.before.get("serving", {}).get("lines", []):
        if line["case"].endswith(_CASE):
            return float(line["value"])
    raise ConfigError("this row is held against the row serving, which has no result here; run that first")


def _ratio(ours: float, lengths: Lengths, ran: Ran, what: str, bar: float) -> Line:
    tokens = sum(output for _, output in lengths)
    rate = tokens / ran.seconds
    cut = f"; cut off after {ran.seconds:.0f} s with {ran.tokens} of {tokens} tokens, so it is slower yet"
    return Line(
        case=f"{len(lengths)} {_CASE}: transformers' {what}",
        value=ours,
        unit="tokens/s",
        limit=rate,
        against=f"transformers {ran.version}",
        bar=bar,
        note=ran.note + (cut if ran.tokens < tokens else ""),
        detail={"seconds": ran.seconds, "output_tokens": ran.tokens},
    )
