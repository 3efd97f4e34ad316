"""transformers on the same shape and requests: continuous batching, and `generate` with a static cache."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.cuda.measure import Bench
from benchmarks.cuda.shapes import write_shape
from gossamer.bench.workload import Lengths
from gossamer.errors import DependencyError

__all__ = ["Ran", "continuous", "load", "static"]

_LEAST = (5, 17)


@dataclass(frozen=True, slots=True)
class Ran:
    """seconds: until all tokens were there or time was up; tokens: those of requests that were done by then;
    note: how it ran."""

    seconds: float
    tokens: int
    version: str
    note: str


def load(bench: Bench, shape: str) -> Any:
    """The shape with random weights in bf16 on the device. Raises DependencyError without transformers."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise DependencyError("transformers is missing; install it with: pip install transformers") from None
    if tuple(map(int, found.split(".")[:2])) < _LEAST:
        raise DependencyError(
            f"this row is written for transformers {'.'.join(map(str, _LEAST))} and later, and {found} is "
            "installed; install a newer one with: pip install --upgrade transformers"
        )
    library = _library()
    config = library.AutoConfig.from_pretrained(write_shape(shape, bench.directory, tiny=bench.tiny))
    with bench.at:
        model = library.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval()


def continuous(model: Any, lengths: Lengths, most: float) -> Ran:
    """All requests through its manager, with its own defaults. most: seconds."""
    library = _library()
    settings = library.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=8)
    # Left to itself it takes most memory there is, which on a GPU is what it is for.
    small = library.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
    given = None if model.device.type == "cuda" else small
    with model.continuous_batching_context_manager(
        settings, timeout=10, continuous_batching_config=given
    ) as manager:
        _serve(manager, model, [(prompt, 4) for prompt, _ in lengths[:8]], most)  # warms
        seconds, tokens = _serve(manager, model, lengths, most)
        note = f"{model.config._attn_implementation}, its own choice of blocks and step"
        if tokens < sum(output for _, output in lengths):
            manager.stop(hard_stop=True, timeout=10)
    return Ran(seconds, tokens, version("transformers"), note)


def _serve(manager: Any, model: Any, lengths: Lengths, most: float) -> tuple[float, int]:
    """Seconds and tokens of finished requests."""
    prompts = [_prompt(model, count, seed).tolist() for seed, (count, _) in enumerate(lengths)]
    began, tokens, waiting = time.perf_counter(), 0, len(lengths)
    for ids, (_, output) in zip(prompts, lengths, strict=True):
        manager.add_request(ids, max_new_tokens=output, eos_token_id=-1)
    while waiting and time.perf_counter() - began < most:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' generation thread ended; its log says why")
        elif result.error:
            raise RuntimeError(f"transformers failed a request: {result.error}")
        elif result.is_finished():
            tokens, waiting = tokens + len(result.generated_tokens), waiting - 1
    return time.perf_counter() - began, tokens


def static(model: Any, lengths: Lengths, most: float, *, batch: int) -> Ran:
    """Batches in the requests' order, each padded to its longest prompt and run to its longest output; only
    what requests asked for counts. most: seconds, looked at between batches."""
    groups = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    room = max(max(p for p, _ in group) + max(o for _, o in group) for group in groups)
    _generate(model, [(prompt, 4) for prompt, _ in groups[0]], room)  # compiles
    began, tokens = time.perf_counter(), 0
    for group in groups:
        _generate(model, group, room)
        tokens += sum(output for _, output in group)
        if time.perf_counter() - began > most:
            break
    seconds = time.perf_counter() - began
    compiled = "compiled as it chooses" if model.device.type == "cuda" else "not compiled without a GPU"
    note = f"batches of {batch}, {model.config._attn_implementation}, {compiled}"
    return Ran(seconds, tokens, version("transformers"), note)


def _generate(model: Any, group: Lengths, room: int) -> None:
    widest = max(prompt for prompt, _ in group)
    ids = torch.zeros(len(group), widest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(group):
        ids[row, widest - prompt :] = _prompt(model, prompt, row)
        mask[row, widest - prompt :] = 1
    steps = max(output for _, output in group)
    settings = _library().GenerationConfig(
        do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=steps, min_new_tokens=steps,
        cache_implementation="static", max_cache_len=room,
    )  # fmt: skip
    at = model.device
    with torch.inference_mode():
        out = model.generate(ids.to(at), attention_mask=mask.to(at), generation_config=settings)
    if out.shape[1] != widest + steps:
        raise RuntimeError(f"generate gave {out.shape[1] - widest} tokens where {steps} were asked for")


def _prompt(model: Any, count: int, seed: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def _library() -> Any:
    """Untyped, for it is another version than the one that tests are checked with."""
    return importlib.import_module("transformers")
