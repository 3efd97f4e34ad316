"""llama.cpp through llama-cpp-python's ctypes interface, built from source for this machine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import Format, Limits, Peer, PeerError, Timing

__all__ = ["PEER"]

_BATCH = 512
_FTYPES = {"Q4_0": (2, False), "Q4_0-pure": (2, True), "Q4_K_M": (15, False), "Q8_0": (7, False)}
"""llama.h: llama_ftype, and whether every tensor (head and embedding too) takes it."""


class _Session:
    def __init__(self, model: Any, context: Any, sequences: int) -> None:
        import llama_cpp as lib

        self.lib, self.model, self.context, self.sequences = lib, model, context, sequences
        self.batch = lib.llama_batch_init(_BATCH, 0, 1)
        self.sampler = lib.llama_sampler_init_greedy()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        """Prompts share batches of up to 512 tokens, as the library's server packs them."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        began = time.perf_counter()
        newest: dict[int, int] = {}
        line: list[tuple[int, int, int, bool]] = []
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                line.append((token, position, sequence, position == len(prompt) - 1))
                if len(line) == _BATCH:
                    newest |= self._decode(line)
                    line = []
        if line:
            newest |= self._decode(line)
        first = time.perf_counter()
        for step in range(new_tokens - 1):
            newest = self._decode(
                [(newest[s], len(prompt) + step, s, True) for s, prompt in enumerate(prompts)]
            )
        return Timing(first - began, time.perf_counter() - first, (new_tokens - 1) * len(prompts))

    def _decode(self, line: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Runs (token, position, sequence, sampled) lines; gives the next token of each sampled sequence."""
        batch = self.batch
        batch.n_tokens = len(line)
        for i, (token, position, sequence, sampled) in enumerate(line):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, sampled
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        if status := self.lib.llama_decode(self.context, batch):
            raise PeerError(f"llama_decode gave {status}")
        return {
            sequence: self.lib.llama_sampler_sample(self.sampler, self.context, i)
            for i, (_, _, sequence, sampled) in enumerate(line)
            if sampled
        }


def _load(target: Path, format: str, limits: Limits) -> _Session:
    import llama_cpp as lib

    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(str(target).encode(), model_params)
    if not model:
        raise PeerError(f"{target} could not be loaded")
    params = lib.llama_context_default_params()
    params.n_ctx = limits.sequences * (-(-limits.tokens // 256) * 256)
    params.n_batch = params.n_ubatch = _BATCH
    params.n_seq_max = limits.sequences
    params.n_threads = params.n_threads_batch = limits.threads
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise PeerError(f"no context of {params.n_ctx} tokens could be made")
    return _Session(model, context, limits.sequences)


def _prepare(checkpoint: Path, target: Path, format: str) -> None:
    """GGUF in bf16 from the checkpoint, then the library's own quantization."""
    import ctypes

    import llama_cpp as lib

    whole = target.with_name("BF16")
    if not whole.is_file():
        _write_gguf(checkpoint, whole)
    if format == "BF16":
        return
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.pure = _FTYPES[format]
    aside = target.with_name(f".{target.name}.part")
    if lib.llama_model_quantize(str(whole).encode(), str(aside).encode(), ctypes.byref(params)):
        raise PeerError(f"llama_model_quantize to {format} failed")
    aside.rename(target)


def _write_gguf(checkpoint: Path, target: Path) -> None:
    """Names and the order of rotary rows as in llama.cpp's llama architecture; no vocabulary."""
    import gguf
    import numpy as np

    config = json.loads((checkpoint / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise PeerError(f"only LlamaForCausalLM is written as GGUF here, not {config['architectures'][0]}")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    aside = target.with_name(f".{target.name}.part")
    writer = gguf.GGUFWriter(aside, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, array in _bf16_tensors(checkpoint / "model.safetensors"):
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None
        if array.ndim == 1:
            wide = (array.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(stored, wide)
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            n = heads if "q_proj" in name else kv_heads
            rows = array.reshape(n, 2, array.shape[0] // n // 2, array.shape[1])
            array = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(array.shape)
        writer.add_tensor(stored, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    if factors := _rope_factors(config):
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    aside.rename(target)


def _bf16_tensors(path: Path) -> Any:
    """(name, uint16 view) of every tensor of a bf16 safetensors file, mapped."""
    import numpy as np

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, mode="r", offset=8 + size)
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            yield name, data[start:stop].view(np.uint16).reshape(entry["shape"])


def _rope_factors(config: dict[str, Any]) -> list[float]:
    """What llama.cpp divides each rotary frequency by, for Llama 3's scaling; [] where there is none."""
    scaling = config.get("rope_scaling")
    if not scaling:
        return []
    if scaling["rope_type"] != "llama3":
        raise PeerError(f"rope scaling {scaling['rope_type']!r} is not written as GGUF here")
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    whole = scaling["original_max_position_embeddings"]
    found = []
    for i in range(0, config["head_dim"], 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (i / config["head_dim"])
        smooth = min(max((whole / wavelength - low) / (high - low), 0.0), 1.0)
        found.append(1.0 / ((1 - smooth) / factor + smooth))
    return found


PEER = Peer(
    name="llama.cpp",
    requirements=("llama-cpp-python==0.3.36", "gguf>=0.17"),
    formats=(
        Format("Q4_0-pure", 4),
        Format("Q4_0", 4, head="Q6_K", default=True),
        Format("Q8_0", 8, default=True),
        Format("BF16", 16, default=True),
    ),
    prepare=_prepare,
    load=_load,
    install_args=("--no-binary", "llama-cpp-python"),
    install_env={
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DCMAKE_C_FLAGS=-march=native -DCMAKE_CXX_FLAGS=-march=native "
        "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF "
        "-DLLAMA_BUILD_SERVER=OFF"
    },
    run_env={"OMP_NUM_THREADS": "{threads}", "OMP_PROC_BIND": "close", "OMP_PLACES": "threads"},
    note="Q4_0: groups of 32, fp16 scales; f16 KV",
)
