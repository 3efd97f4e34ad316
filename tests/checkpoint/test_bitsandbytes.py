"""bitsandbytes, held to the library that defines it: what it writes is read, and its own values are near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gossamer.checkpoint.model_writer import write_config, write_weights
from gossamer.checkpoint.opening import notes_of, open_checkpoint
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.graph.ops.formats import NF4
from tests.checkpoint.coded import SIZES, check_served, config_json, opened, projections, small_model

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install gossamer[dev])")

LLAMA = transformers.LlamaConfig(**SIZES)
Made = tuple[Path, dict[str, torch.Tensor]]


def save(directory: Path, model: Any, tensors: dict[str, Any], **settings: Any) -> None:
    write_weights(directory, {name: np.ascontiguousarray(v) for name, v in tensors.items()})
    quantization = {"quant_method": "bitsandbytes", "llm_int8_threshold": 6.0, **settings}
    write_config(directory, {**config_json(model), "quantization_config": quantization})


def nf4(model: Any, nested: bool, block: int = 64) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """All projections through the library, and what it makes of them."""
    tensors, values = {}, {}
    for name, value in model.state_dict().items():
        if name in projections(model):
            packed, state = bitsandbytes.functional.quantize_4bit(
                value, blocksize=block, compress_statistics=nested, quant_type="nf4"
            )
            values[name] = bitsandbytes.functional.dequantize_4bit(packed, state)
            tensors |= {f"{name}.{part}": v.numpy() for part, v in state.as_dict(packed=True).items()}
            tensors[name] = packed.numpy()
        else:
            tensors[name] = value.numpy()
    return tensors, values


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64])
def test_nf4_keeps_every_level(tmp_path: Path, nested: bool, block: int) -> None:
    model = small_model(LLAMA)
    tensors, values = nf4(model, nested, block)
    save(
        tmp_path,
        model,
        tensors,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
    )
    _, source = opened(tmp_path)
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").numpy()
    for name, theirs in values.items():
        codes = source.read_codes(name, 5, 31)
        scale = np.repeat(codes.scales, codes.group, axis=1)
        # The library's level times the largest of the block, which is 127 of our scale up to its rounding.
        np.testing.assert_allclose(levels[codes.codes] * scale * 127, theirs[5:31], rtol=6e-4, atol=1e-7)
        ours = np.asarray(NF4, np.float32)[codes.codes] * scale
        np.testing.assert_array_equal(source.read_rows(name, 5, 31), ours)
        assert np.abs(ours - theirs[5:31].numpy()).max() < 0.005 * theirs.abs().max()
    assert "127ths" in notes_of(source)[0]
    check_served(tmp_path, {"nf4-g64"})


def test_int8_is_the_same_integers(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    tensors, state = {}, model.state_dict()
    for name in projections(model):
        integers, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(state[name].half())
        module = name.removesuffix(".weight")
        tensors |= {
            name: integers.numpy(),
            f"{module}.SCB": scales.numpy(),
            f"{module}.weight_format": np.uint8(0),
        }
        state[name] = bitsandbytes.functional.int8_vectorwise_dequant(integers, scales).float()
    tensors |= {n: v.numpy() for n, v in state.items() if n not in tensors}
    save(tmp_path, model, tensors, load_in_8bit=True)
    _, source = opened(tmp_path)
    for name in projections(model):
        np.testing.assert_array_equal(source.read_codes(name, 1, 30).codes, tensors[name][1:30])
        np.testing.assert_allclose(source.read(name), state[name], rtol=1e-5)
    assert "llm_int8_threshold" in notes_of(source)[0]
    check_served(tmp_path, {"int8"})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"load_in_4bit": True}, "bnb_4bit_quant_type is 'fp4'"),
        ({}, "exactly one"),
        ({"load_in_8bit": True}, r"no tensor's name ends in .SCB"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "twist": 1}, "twist=1 is not understood"),
    ],
)
def test_what_config_json_says_must_be_understood_and_fit(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    model = small_model(LLAMA)
    save(tmp_path, model, nf4(model, True)[0], **settings)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=words):
        open_checkpoint(tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    whole, _ = nf4(model, True)
    name = projections(model)[0]
    state = f"{name}.quant_state.bitsandbytes__nf4"

    def text(words: bytes) -> Any:
        return lambda _: np.frombuffer(words, np.uint8)

    for part, change, words in [
        (f"{name}.absmax", None, "absmax' is missing"),
        (f"{name}.nested_absmax", lambda v: np.tile(v, 2), r"nested_absmax' is F32 \(2,\)"),
        (f"{name}.quant_map", lambda v: v[::-1], "levels of NF4"),
        (name, lambda v: v[:-1], "2048 bytes"),
        (state, text(b"{"), "not valid JSON"),
        (state, text(b'{"shape": [1e30, 2], "blocksize": 64}'), "a number are right"),
        (state, text(b'{"shape": [64, 4611686018427387904], "blocksize": 64}'), "a number are right"),
        (state, text(b'{"shape": [64, 64], "blocksize": 48}'), "multiple of 32"),
    ]:  # fmt: skip
        tensors = {**whole, **({} if change is None else {part: change(whole[part])})}
        if change is None:
            del tensors[part]
        save(tmp_path, model, tensors, load_in_4bit=True, bnb_4bit_quant_type="nf4")
        with pytest.raises((CheckpointError, UnsupportedModelError), match=words):
            open_checkpoint(tmp_path)
