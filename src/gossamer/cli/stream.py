"""One request run to its end, its text written as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from gossamer.bench.memory import memory_figures
from gossamer.cli.word_wrap import WordWrap, terminal_wrap
from gossamer.engine.request import SamplingParams
from gossamer.text_engine import TextEngine

__all__ = ["run_request", "token_timing"]


def run_request(
    engine: TextEngine,
    ids: tuple[int, ...],
    params: SamplingParams,
    *,
    live: bool,
    wrap: WordWrap | None = None,
) -> dict[str, Any]:
    """Runs a request and gives its report for JSON.

    live: write the text to standard output, of a single output as it comes, of several when all are done.
    wrap: what broke the text that stands before it on the line; a new one if the line is empty.
    """
    wrap = wrap or terminal_wrap()
    outputs: list[dict[str, Any]] = [
        {"index": i, "text": "", "token_ids": [], "finish_reason": None, "stop_reason": None}
        for i in range(params.n)
    ]
    if params.logprobs is not None:
        for output in outputs:
            output["logprobs"] = []
    arrivals: list[list[float]] = [[] for _ in outputs]
    request = engine.new_id()
    engine.submit(request, ids, params)
    times: dict[str, float] = {}
    try:
        for update in engine.run():
            now = time.perf_counter()
            output = outputs[update.index]
            output["text"] += update.text
            output["token_ids"] += update.tokens
            arrivals[update.index] += [now] * len(update.tokens)
            if update.logprobs:
                output["logprobs"] += [
                    {"token_id": l.token, "logprob": l.logprob, "top": [list(t) for t in l.top]}
                    for l in update.logprobs
                ]
            output["finish_reason"], output["stop_reason"] = update.finish_reason, update.stop_reason
            times = dict(update.times)
            if live and params.n == 1:
                sys.stdout.write(wrap.feed(update.text))
                sys.stdout.flush()
    finally:
        engine.abort(request)
        if live and params.n == 1:
            sys.stdout.write(wrap.flush() + "\n")
    if live and params.n > 1:
        for output in outputs:
            text = wrap.feed(f"[{output['index'] + 1}] {output['text']}\n")
            print(text)
    stats = engine.engine.stats()
    return {
        "text": outputs[0]["text"],
        "token_ids": outputs[0]["token_ids"],
        "prompt_token_ids": list(ids),
        "finish_reason": outputs[0]["finish_reason"],
        "timing": token_timing(times, arrivals),
        "memory": memory_figures(engine.started.memory),
        "speculation": {"drafted": stats.drafted, "accepted": stats.accepted},
        "outputs": outputs,
    }


def token_timing(times: Mapping[str, float], arrivals: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """ttft from arrival; gaps between the tokens of one output; tokens a second after the first."""
    gaps = [b - a for tokens in arrivals for a, b in pairwise(tokens)]
    first = times.get("first_token")
    last = max((tokens[-1] for tokens in arrivals if tokens), default=0.0)
    later = sum(len(tokens) for tokens in arrivals) - len(arrivals)
    busy = last - first if first is not None else 0.0
    return {
        "ttft_ms": None if first is None else round((first - times["arrival"]) * 1e3, 3),
        "itl_ms_median": round(median(gaps) * 1e3, 4) if gaps else None,
        "decode_tokens_per_s": round(later / busy, 3) if later > 0 and busy > 0 else None,
    }
