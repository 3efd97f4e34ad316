"""compressed-tensors, held to the library that defines it and to transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from gossamer.checkpoint.codes import CodedTensor
from gossamer.checkpoint.compressed_tensors import must_stay_floats, write_compressed_tensors
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.errors import CheckpointError
from gossamer.graph.families import build_graph
from tests.checkpoint.coded import (
    SIZES,
    Stored,
    check_codes,
    check_served,
    config_json,
    encode,
    logits,
    projections,
    random_codes,
    small_model,
    write,
)

LLAMA = transformers.LlamaConfig(**SIZES)
MODELS = {
    "llama": LLAMA,
    "tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=3),
}
HEAD = ["model.embed_tokens.weight", "lm_head.weight"]


def loaded(directory: Path) -> Any:
    model, info = type_of(directory).from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def type_of(directory: Path) -> Any:
    return getattr(transformers, transformers.AutoConfig.from_pretrained(directory).architectures[0])


@pytest.mark.parametrize(
    "name, stored, more",
    [
        ("llama", [("int4", 32)], HEAD),
        ("tied", [("int4", 64)], []),
        ("qwen2", [("int4", 32), ("int8", 32), ("int8", 16)], []),
        ("mixtral", [("int4", 32)], []),
    ],
)
def test_transformers_computes_with_what_was_written(
    tmp_path: Path, name: str, stored: list[Stored], more: list[str]
) -> None:
    model = small_model(MODELS[name])
    write(model, encode(model, stored, projections(model) + more), tmp_path)
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [None, 0.02])
def test_int8_goes_with_int8_activations(tmp_path: Path, scale: float | None) -> None:
    model = small_model(LLAMA)
    stored: Stored = ("int8", 0) if scale is None else ("int8", 0, scale)
    coded = encode(model, [stored], projections(model)) | encode(model, [("int8", 0)], HEAD[:1])
    write(model, coded, tmp_path)

    def rounded(module: Any, args: tuple[torch.Tensor]) -> torch.Tensor:
        x = args[0]
        step = x.abs().amax(-1, keepdim=True) / 127.5 if scale is None else torch.tensor(scale)
        return (x / step).round().clamp(-128, 127) * step

    for part in coded:
        if part not in HEAD:  # nothing rounds token ids
            model.get_submodule(part.removesuffix(".weight")).register_forward_pre_hook(rounded)
    there = loaded(tmp_path)
    torch.testing.assert_close(logits(there), logits(model), atol=1e-4, rtol=0)
    for part in coded:
        np.testing.assert_array_equal(there.get_parameter(part).detach(), coded[part].make().floats())


@pytest.mark.parametrize("n, k, group", [(24, 64, 64), (13, 256, 128), (1, 32, 32)])
def test_the_library_reads_zero_points(tmp_path: Path, n: int, k: int, group: int) -> None:
    model = small_model(LLAMA)
    codes = random_codes("uint4", group, n, k, 1)
    name = "model.layers.0.mlp.up_proj"
    coded = CodedTensor(format="uint4", group=group, shape=(n, k), make=lambda: codes)
    write_compressed_tensors(tmp_path, config_json(model), {}, {f"{name}.weight": coded})
    file = Checkpoint(tmp_path)
    state = {part.rsplit(".", 1)[1]: torch.from_numpy(file.read(part).copy()) for part in file.names()}
    state["weight_scale"] = state["weight_scale"].float()
    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    reader = BaseCompressor.get_value_from_registry("pack-quantized")
    np.testing.assert_array_equal(reader.decompress(state, scheme)["weight"], codes.floats())
    ours = transformers.AutoConfig.from_pretrained(tmp_path).quantization_config["config_groups"]["group_0"]
    assert QuantizationScheme.model_validate(ours).weights == args


def test_what_loaders_cannot_take_is_refused(tmp_path: Path) -> None:
    tied = small_model(MODELS["tied"])
    assert list(must_stay_floats(build_graph(config_json(tied)))) == HEAD[:1]
    with pytest.raises(CheckpointError, match=r"embed_tokens.*tied"):
        write(tied, encode(tied, [("int4", 32)], HEAD[:1]), tmp_path)
    moe = must_stay_floats(build_graph(config_json(small_model(MODELS["mixtral"]))))
    assert list(moe) == ["model.layers.0.block_sparse_moe.gate.weight"]
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_head": 4, "n_layer": 1, "vocab_size": 101}
    names = must_stay_floats(build_graph(gpt2))
    assert {"transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"} < set(names)
    model = small_model(LLAMA)
    name = projections(model)[0]
    whole = encode(model, [("int4", 32)], [name])[name]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"group": 128}, "64 inputs.*128"),
        ({"format": "nf4"}, "no nf4"),
        ({"activation_scale": 1.0}, "static"),
        ({"shape": (65, 64)}, "announced as.*came as"),
    ]
    for change, words in changes:
        with pytest.raises(CheckpointError, match=words):
            write(model, {name: replace(whole, **change)}, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    "name, stored, more",
    [
        ("llama", [("int8", 0, 0.02), ("int4", 32), ("uint4", 64), ("int8", 16)], HEAD),
        ("tied", [("int4", 64), ("int8", 0)], []),
        ("qwen2", [("uint4", 32), ("int8", 32)], HEAD),
        ("mixtral", [("int4", 32)], []),
    ],
)
def test_what_was_written_is_served_integer_by_integer(
    tmp_path: Path, name: str, stored: list[Stored], more: list[str]
) -> None:
    model = small_model(MODELS[name])
    coded = encode(model, stored, projections(model) + more)
    write(model, coded, tmp_path)
    check_codes(tmp_path, coded)
    check_served(tmp_path, {t.format + (f"-g{t.group}" if t.group else "") for t in coded.values()})
