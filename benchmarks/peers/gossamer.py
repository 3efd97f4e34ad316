"""Gossamer itself, through the same contract."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import Format, Limits, Peer, Timing

__all__ = ["PEER"]


class _Session:
    """The engine itself, in token ids: no peer is asked for text."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.next_id = 0

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        from gossamer.engine.request import Request, SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        waiting = set()
        came = before = 0
        last_first = began = time.perf_counter()
        for prompt in prompts:
            request = Request(id=str(self.next_id), prompt_ids=tuple(prompt), params=params)
            self.next_id += 1
            waiting.add(request.id)
            self.engine.submit(request)
        while self.engine.has_work():
            updates = self.engine.step()
            came += sum(len(update.tokens) for update in updates)
            if waiting:
                waiting -= {update.request_id for update in updates if update.tokens}
                last_first, before = time.perf_counter(), came
        return Timing(last_first - began, time.perf_counter() - last_first, came - before)


def _prepare(checkpoint: Path, target: Path, format: str) -> None:
    """Packs the weights into the cache, as a first start does."""
    _load(checkpoint, format, Limits(0, 1, 16))


def _load(target: Path, format: str, limits: Limits) -> _Session:
    from gossamer.config import ContinuousBatching
    from gossamer.engine.engine import Engine
    from gossamer.llm import engine_config
    from gossamer.runtime.start import start

    stored = {"dtype": "bfloat16"} if format == "bf16" else {"quantization": format}
    config = engine_config(
        target,
        threads=limits.threads or None,
        max_num_seqs=limits.sequences,
        max_model_len=limits.tokens,
        **stored,  # type: ignore[arg-type]
    )
    batching = config.continuous_batching or ContinuousBatching()
    return _Session(Engine(start(config).executor, batching=batching, max_num_seqs=limits.sequences))


PEER = Peer(
    name="Gossamer",
    requirements=(),
    formats=(Format("int4", 4), Format("int8", 8), Format("bf16", 16, default=True)),
    prepare=_prepare,
    load=_load,
    note="int4: groups of 128 (64 or 32 where those divide no input size), fp16 scales; bf16 KV",
)
