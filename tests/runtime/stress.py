"""A random load in a process of its own, for test_memory_guarantee.py.

    python -m tests.runtime.stress SECONDS

Prints one JSON object: the bytes that the start promised, and how much of what was served.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from typing import Any

from gossamer.engine.request import SamplingParams, StructuredOutputs
from gossamer.errors import RequestError
from gossamer.llm import engine_config
from gossamer.text_engine import TextEngine

# KV memory for four of the longest sequences, so that sixteen of them push each other out.
OPTIONS: dict[str, Any] = {
    "model": "gossamer/pocket",
    "quantization": "int8",
    "weight_cache": False,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "kv_bytes": 6 << 20,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
}
_SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
_GRAMMARS = (
    StructuredOutputs(json=_SCHEMA),
    StructuredOutputs(regex="[a-z]{1,12}( [a-z]{1,12}){0,3}"),
    StructuredOutputs(choice=("yes", "no", "perhaps")),
)


def params(rng: random.Random) -> SamplingParams:
    """Of one request, anything that takes memory of its own among it."""
    grammar = rng.choice((None,) * 6 + _GRAMMARS)
    return SamplingParams(
        n=rng.choice((1, 1, 1, 2, 3)),
        max_tokens=rng.choice((1, 8, 40, 200)),
        temperature=rng.choice((0.0, 0.7, 1.2)),
        top_p=rng.choice((1.0, 0.9)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.2)),
        logprobs=rng.choice((None, None, 0, 20)),
        prompt_logprobs=rng.choice((None,) * 9 + (20,)),
        logit_bias={rng.randrange(8192): 1.5 for _ in range(100)} if rng.random() < 0.1 else None,
        stop=rng.choice(((), (), ("the", "zzz"))),
        ignore_eos=rng.random() < 0.5 and grammar is None,
        structured_outputs=grammar,
    )


_MOST_SECONDS = 120.0


def run(seconds: float) -> dict[str, Any]:
    """Serves for so many seconds, then ends what is left."""
    engine = TextEngine.start(engine_config(**OPTIONS))
    rng, did, live = random.Random(7), Counter[str](), []
    beginnings = [[rng.randrange(3, 8192) for _ in range(200)] for _ in range(8)]
    end = time.monotonic() + seconds
    late = end + _MOST_SECONDS  # on a crowded machine it may take longer until everything has happened

    def happened() -> bool:
        stats = engine.engine.stats()
        return bool(stats.preemptions and stats.prefix_hits and stats.drafted and did["aborted"])

    while (now := time.monotonic()) < end or (now < late and not happened()):
        while engine.engine.stats().waiting < 12:
            shared = rng.choice(beginnings)[: rng.randrange(200)] if rng.random() < 0.5 else []
            own = [rng.randrange(3, 8192) for _ in range(rng.choice((1, 30, 300)))]
            try:
                name = engine.new_id()
                engine.submit(name, shared + own, params(rng))
                live.append(name)
                did["submitted"] += 1
            except RequestError:
                did["refused"] += 1
        if rng.random() < 0.02:
            did["aborted"] += bool(engine.abort(live.pop(rng.randrange(len(live)))))
        for update in engine.step():
            did["tokens"] += len(update.tokens)
            did["finished"] += update.finish_reason is not None
        del live[:-64]
    stats, started = engine.engine.stats(), engine.started
    engine.close()
    return {
        **did,
        "promised": started.memory.total + started.process,
        "preempted": stats.preemptions,
        "shared": stats.prefix_hits,
        "drafted": stats.drafted,
    }


if __name__ == "__main__":
    print(json.dumps(run(float(sys.argv[1]))))
