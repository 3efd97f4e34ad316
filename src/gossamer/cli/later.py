"""Verbs and flags known from the plan or from other engines that this version has not: what to do instead."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["known_elsewhere"]

_GPU = "a model runs on one device, --device cuda or cpu; --offload brings what does not fit on a GPU"
_LOGGED = "prompts and outputs are never logged; leave it out"
_PARALLEL = "tensor parallelism is not built yet; --threads uses the cores of this machine"
_SPECULATIVE = (
    '--speculative-config says all of it: {"method": "draft_model", "model": MODEL, '
    '"num_speculative_tokens": 4}'
)

_INSTEAD = {
    # from the plan
    "--tensor-parallel-size": _PARALLEL,
    "--tp": _PARALLEL,
    "--pipeline-parallel-size": "pipeline parallelism is not built yet",
    # from vLLM
    "--gpu-memory-utilization": "--memory-budget limits the memory of the device that runs, "
    "--kv-bytes the KV pool",
    "--kv-cache-memory-bytes": "--kv-bytes sets the size of the KV pool",
    "--swap-space": "--swap-bytes sets the room for KV pages that are swapped: a file; of a GPU, host memory",
    "--cpu-offload-gb": "--offload auto streams from host memory what does not fit on a GPU; a size there "
    "is the device memory that weights may take",
    "--block-size": "--page-size sets the tokens of a KV page",
    "--enable-chunked-prefill": "always on; --prefill-chunk sets its size",
    "--enforce-eager": "--no-layer-fusion records no CUDA graphs; --backend reference runs eager torch",
    "--trust-remote-code": "code from a checkpoint is never run; leave it out",
    "--download-dir": "HF_HOME says where the hub cache is",
    "--tokenizer": "the tokenizer is the one in the model's directory",
    "--speculative-model": _SPECULATIVE,
    "--num-speculative-tokens": _SPECULATIVE,
    "--max-logprobs": "a request may ask for up to 20 log-probabilities; leave it out",
    "--disable-log-requests": _LOGGED,
    "--enable-log-requests": _LOGGED,
    "--num-gpu-blocks-override": "--kv-bytes sets the size of the KV pool",
    # from llama.cpp
    "--n-gpu-layers": _GPU,
    "--gpu-layers": _GPU,
    "-ngl": _GPU,
    "--ctx": "--max-model-len (or --ctx-size, -c) sets the context",
    "--n-predict": "--max-tokens (or -n) sets the length of the output",
    "--predict": "--max-tokens (or -n) sets the length of the output",
    "--temp": "--temperature it is",
    "--repeat-penalty": "--repetition-penalty it is",
    "--cache-type-k": "--kv-cache-dtype sets the type of keys and values",
    "--cache-type-v": "--kv-cache-dtype sets the type of keys and values",
    "--parallel": "--max-num-seqs (or -np) sets how many sequences run at once",
    "--file": "--prompt-file takes the prompt from a file",
    "--alias": "--served-model-name sets the name that clients use",
}


def known_elsewhere(arguments: Sequence[str], message: str) -> str | None:
    """What to say of a command line that was refused with `message`; None where it is plainly wrong."""
    for argument in arguments:
        name = argument.split("=", 1)[0]
        # -ngl reads as -n gl, so the complaint is about another flag.
        if name in _INSTEAD and (name == "-ngl" or name in message):
            return f"{name}: {_INSTEAD[name]}"
    return None
