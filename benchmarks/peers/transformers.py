"""transformers on torch, as `generate` runs it: eager, greedy, with its own cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import Format, Limits, Peer, Timing

__all__ = ["PEER"]


class _Session:
    def __init__(self, model: Any) -> None:
        self.model = model

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        """`generate` asks a stopping criterion after each token, which writes down the time."""
        import torch

        ids = torch.tensor(prompts)
        times: list[float] = []

        def note(ids: Any, scores: Any, **kwargs: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool)

        began = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                stopping_criteria=[note],
                pad_token_id=0,
            )
        return Timing(times[0] - began, times[-1] - times[0], (new_tokens - 1) * len(prompts))


def _load(target: Path, format: str, limits: Limits) -> _Session:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(limits.threads)
    torch.set_num_interop_threads(1)
    dtype = {"bf16": torch.bfloat16}[format]
    model: Any = AutoModelForCausalLM.from_pretrained(str(target), dtype=dtype)
    return _Session(model.eval())


def _prepare(checkpoint: Path, target: Path, format: str) -> None:
    """It reads the checkpoint as it is."""
    target.symlink_to(checkpoint, target_is_directory=True)


PEER = Peer(
    name="transformers",
    requirements=("transformers==4.57.6", "torch==2.13.0"),
    formats=(Format("bf16", 16, default=True),),
    prepare=_prepare,
    load=_load,
    run_env={"OMP_PROC_BIND": "close", "OMP_PLACES": "threads", "HF_HUB_OFFLINE": "1"},
    note="eager torch through generate(); bf16 KV",
)
