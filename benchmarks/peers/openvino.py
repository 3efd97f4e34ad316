"""OpenVINO GenAI: exported by optimum-intel, weights compressed by NNCF, run by its continuous batching."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import Format, Limits, Peer, Timing

__all__ = ["PEER"]


class _Session:
    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.next_id = 0

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        began = time.perf_counter()
        handles = []
        for prompt in prompts:
            ids = openvino.Tensor(np.array([prompt], np.int64))
            handles.append(self.pipeline.add_request(self.next_id, ids, config))
            self.next_id += 1
        first, came, before = began, 0, 0
        waiting = set(range(len(handles)))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for i, handle in enumerate(handles):
                while handle.can_read():
                    count = sum(len(output.generated_ids) for output in handle.read().values())
                    came += count
                    if i in waiting and count:
                        waiting.discard(i)
                        first, before = time.perf_counter(), 0
            if not waiting and not before:
                before = came
        return Timing(first - began, time.perf_counter() - first, came - before)


def _load(target: Path, format: str, limits: Limits) -> _Session:
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 512
    scheduler.max_num_seqs = limits.sequences
    scheduler.num_kv_blocks = limits.sequences * (-(-limits.tokens // 32) + 1)
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": limits.threads, "ENABLE_CPU_PINNING": True}
    return _Session(openvino_genai.ContinuousBatchingPipeline(str(target), scheduler, "CPU", properties))


def _prepare(checkpoint: Path, target: Path, format: str) -> None:
    """Exports the model, then compresses its weights. int4-all takes the head and embedding too, which
    the default keeps in int8."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    options: dict[str, Any] = {"bits": 8}
    if format.startswith("int4"):
        options = {"bits": 4, "group_size": _group(checkpoint)}
    if format == "int4-all":
        options |= {"sym": True, "ratio": 1.0, "all_layers": True}
    model = OVModelForCausalLM.from_pretrained(
        str(checkpoint), export=True, compile=False, quantization_config=OVWeightQuantizationConfig(**options)
    )
    model.save_pretrained(str(target))
    _tokenizer(checkpoint, target)


def _group(checkpoint: Path) -> int:
    """The largest usual group that divides every layer's input size."""
    config = json.loads((checkpoint / "config.json").read_text())
    sizes = (config["hidden_size"], config["intermediate_size"])
    return next((g for g in (128, 64) if all(size % g == 0 for size in sizes)), 32)


def _tokenizer(checkpoint: Path, target: Path) -> None:
    """The pipeline opens one even for token ids."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    made: Any = AutoTokenizer
    tokenizer = made.from_pretrained(str(checkpoint))
    encode, decode = convert_tokenizer(tokenizer, with_detokenizer=True)
    openvino.save_model(encode, str(target / "openvino_tokenizer.xml"))
    openvino.save_model(decode, str(target / "openvino_detokenizer.xml"))


PEER = Peer(
    name="OpenVINO GenAI",
    requirements=("openvino-genai", "optimum-intel", "nncf", "torch==2.13.0"),
    formats=(
        Format("int4-all", 4),
        Format("int4", 4, head="int8", default=True),
        Format("int8", 8, default=True),
    ),
    prepare=_prepare,
    load=_load,
    run_env={"HF_HUB_OFFLINE": "1"},
    # PyPI builds it for torch with CUDA; beside a CPU build it breaks the import of transformers.
    unwanted=("torchvision",),
    note="int4: groups of 128 (64 or 32 where those divide no input size), symmetric in int4-all; int8: "
    "per channel; activations and KV as it chooses",
)
