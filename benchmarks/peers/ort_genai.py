"""ONNX Runtime GenAI: models from its own builder, run by its generator."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import Format, Limits, Peer, PeerError, Timing

__all__ = ["PEER"]


class _Session:
    def __init__(self, model: Any) -> None:
        self.model = model

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        import numpy as np
        import onnxruntime_genai as lib

        params = lib.GeneratorParams(self.model)
        total = len(prompts[0]) + new_tokens
        params.set_search_options(
            max_length=total, min_length=total, do_sample=False, batch_size=len(prompts)
        )
        generator = lib.Generator(self.model, params)
        began = time.perf_counter()
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        return Timing(first - began, time.perf_counter() - first, (new_tokens - 1) * len(prompts))


def _load(target: Path, format: str, limits: Limits) -> _Session:
    import onnxruntime_genai as lib

    path = target / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = limits.threads
    path.write_text(json.dumps(config))
    return _Session(lib.Model(str(target)))


def _prepare(checkpoint: Path, target: Path, format: str) -> None:
    """Groups of 32, integer activations (accuracy level 4): the builder's own default for a CPU."""
    options = ["int4_block_size=32", "int4_accuracy_level=4"]
    where = ["-i", str(checkpoint), "-o", str(target), "-c", str(target.with_name("cache"))]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    done = subprocess.run(
        [*builder, *where, "-p", "int4", "-e", "cpu", "--extra_options", *options],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise PeerError(f"the builder failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


PEER = Peer(
    name="ONNX Runtime GenAI",
    requirements=("onnxruntime-genai==0.18.0", "onnx", "onnx-ir", "transformers>=5.20", "torch==2.13.0"),
    formats=(Format("int4", 4, default=True),),
    prepare=_prepare,
    load=_load,
    run_env={"HF_HUB_OFFLINE": "1"},
    note="int4: groups of 32, int8 activations; KV in the type that its builder chooses",
)
