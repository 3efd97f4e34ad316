"""Reading compressed-tensors: what its own compressors write, sparse tensors, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams

from gossamer.checkpoint.json_file import read_json_object
from gossamer.checkpoint.model_writer import from_checkpoint, write_config, write_json, write_weights
from gossamer.checkpoint.opening import notes_of, open_checkpoint
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.coded import (
    SIZES,
    check_served,
    encode,
    opened,
    projections,
    small_model,
    write,
)

LLAMA = transformers.LlamaConfig(**SIZES)


def compress(directory: Path, scheme: QuantizationScheme, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A model through the library: calibrated by each weight's range, compressed and saved. Gives what the
    library makes of the weights."""
    model = small_model(LLAMA).to(dtype)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for _, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        args, weight = scheme.weights, module.weight.data
        groups = weight.reshape(weight.shape[0], -1, args.group_size or weight.shape[1])
        low, high = groups.amin(-1), groups.amax(-1)
        if args.strategy == "tensor":
            low, high = low.amin().reshape(1), high.amax().reshape(1)
        scale, zero = calculate_qparams(low, high, args)
        module.weight_scale.data.copy_(scale.to(dtype))
        module.weight_zero_point.data.copy_(zero)
        if scheme.input_activations is not None and not scheme.input_activations.dynamic:
            module.input_scale.data.fill_(0.03)
            module.input_zero_point.data.zero_()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    compressor.decompress_model(model)
    return {n: v.detach() for n, v in model.state_dict().items() if n in projections(model)}


ARGS = {"num_bits": 8, "strategy": "channel"}
TOKENS = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)


@pytest.mark.parametrize(
    "weights, inputs, dtype, format",
    [
        ({"num_bits": 4, "strategy": "group", "group_size": 32}, None, torch.float16, "int4-g32"),
        ({"num_bits": 4, "strategy": "group", "group_size": 32}, None, torch.bfloat16, "int4-g32"),
        ({"num_bits": 4, "group_size": 64, "symmetric": False}, None, torch.float16, "uint4-g64"),
        ({"num_bits": 8, "group_size": 64}, None, torch.float16, "int8-g32"),
        ({"num_bits": 4, "group_size": 16}, None, torch.float16, "int8-g16"),
        (ARGS, None, torch.float32, "int8"),
        (ARGS, TOKENS, torch.float32, "int8"),
        (ARGS, QuantizationArgs(num_bits=8, strategy="tensor"), torch.float32, "int8"),
        ({"num_bits": 8, "strategy": "tensor"}, TOKENS, torch.bfloat16, "int8"),
    ],
)
def test_what_the_library_writes_is_served(
    tmp_path: Path, weights: dict[str, Any], inputs: QuantizationArgs | None, dtype: torch.dtype, format: str
) -> None:
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=inputs
    )
    theirs = compress(tmp_path, scheme, dtype)
    _, source = opened(tmp_path)
    for name, values in theirs.items():
        # Their product of a scale and an integer is rounded to the model's dtype.
        np.testing.assert_array_equal(torch.from_numpy(source.read(name)).to(dtype).float(), values.float())
        assert source.activation_scale(name) == (np.float32(0.03) if inputs and not inputs.dynamic else 0)
    check_served(tmp_path, {format})


def test_scales_that_fp16_lacks_are_rounded_and_it_is_said(tmp_path: Path) -> None:
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, group_size=32))
    theirs = compress(tmp_path, scheme, torch.float32)
    _, source = opened(tmp_path)
    assert "rounded to fp16" in notes_of(source)[0]
    for name, values in theirs.items():
        np.testing.assert_allclose(source.read(name), values, rtol=6e-4)


def sparse(tensor: np.ndarray, semi: bool) -> dict[str, np.ndarray]:
    """A tensor as compressed-tensors' bitmask formats have it, row by row."""
    mask = np.zeros(tensor.shape, bool)
    if semi:
        for quad in np.ndindex(tensor.shape[0], tensor.shape[1] // 4):
            place = (quad[0], slice(4 * quad[1], 4 * quad[1] + 4))
            mask[place][np.argsort(np.abs(tensor[place].astype(np.float32)))[2:]] = True
    else:
        mask = tensor != 0
    counts = mask.sum(1)
    values = tensor[mask]
    parts = {
        "shape": np.asarray(tensor.shape, np.int64),
        "bitmask": np.packbits(mask, axis=1, bitorder="little"),
        "compressed": values.reshape(tensor.shape[0], -1) if semi else values,
    }
    return parts if semi else {**parts, "row_offsets": np.cumsum(counts) - counts}


@pytest.mark.parametrize("semi", [False, True])
@pytest.mark.parametrize("integers", [False, True])
def test_sparse_tensors_are_read_dense(tmp_path: Path, semi: bool, integers: bool) -> None:
    model = small_model(LLAMA)
    names = projections(model)
    coded = encode(model, [("int8", 0)], names) if integers else {}
    for name in names:
        weight = model.get_parameter(name).data
        lowest = weight.abs().reshape(-1, 4).argsort(1)[:, :2]
        weight.reshape(-1, 4).scatter_(1, lowest, 0)
    write(model, coded, tmp_path)
    dense = Checkpoint(tmp_path)
    tensors: dict[str, Any] = {}
    for name in dense.names():
        array = np.array(dense.read(name))
        if name in names:
            if integers:
                lowest = np.abs(array.astype(np.int16)).reshape(-1, 4).argsort(1)[:, :2]
                np.put_along_axis(array.reshape(-1, 4), lowest, 0, 1)
            tensors |= {f"{name}.{part}": v for part, v in sparse(array, semi).items()}
            coded_as = array
        else:
            tensors[name] = array
    config = read_json_object(tmp_path / "config.json")
    settings = config.setdefault("quantization_config", {"quant_method": "compressed-tensors"})
    settings["sparsity_config"] = {
        "format": "sparse-24-bitmask" if semi else "sparse-bitmask", "targets": ["Linear"],
        "global_sparsity": 0.5, "sparsity_structure": "2:4", "registry_requires_subclass": False,
    }  # fmt: skip
    write_weights(tmp_path, tensors)
    write_config(tmp_path, config)
    _, source = opened(tmp_path)
    last = [n for n in dense.names() if n in names][-1]
    if integers:
        np.testing.assert_array_equal(source.read_codes(last, 0, coded_as.shape[0]).codes, coded_as)
        check_served(tmp_path, {"int8"})
    else:
        for name in names:
            np.testing.assert_array_equal(source.read(name), model.get_parameter(name).detach())
            np.testing.assert_array_equal(
                source.read_rows(name, 7, 23), model.get_parameter(name).detach()[7:23]
            )
    name = f"{names[0]}.bitmask"
    write_weights(tmp_path, {**tensors, name: tensors[name] | 1})
    with pytest.raises(CheckpointError, match=r"bitmask' marks \d+ values.*compressed' has"):
        open_checkpoint(tmp_path).read(names[0])
    write_weights(tmp_path, {**tensors, f"{names[0]}.shape": np.asarray([1 << 40, 1 << 40])})
    with pytest.raises(CheckpointError, match="bitmask' is U8"):
        open_checkpoint(tmp_path)


Change = Callable[[dict[str, Any]], Any]


def group(change: dict[str, Any]) -> Change:
    return lambda c: c["config_groups"]["group_0"].update(change)


def weights(change: dict[str, Any]) -> Change:
    return lambda c: c["config_groups"]["group_0"]["weights"].update(change)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda c: c.update(format="float-quantized"),
            r"format is 'float-quantized'.*int4 \(pack-quantized\)",
        ),
        (lambda c: c.update(format="marlin-24"), "marlin-24"),
        (lambda c: c.update(format="nvfp4-pack-quantized"), "nvfp4"),
        (lambda c: c.update(twist=1), r"quantization_config.twist=1 is not understood"),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme.*--kv-cache-dtype int8"),
        (lambda c: c.update(quantization_status="frozen"), "compress it"),
        (lambda c: c.update(ignore=["model.layers.0.mlp.up_proj"]), r"up_proj' is quantized.*ignore"),
        (lambda c: c.update(ignore=["re:.*down_proj"]), r"down_proj' is quantized.*ignore"),
        (lambda c: c.update(ignore=["re:*"]), "no pattern"),
        (lambda c: c.update(ignore="lm_head"), "a list of names"),
        (lambda c: c.update(config_groups=[1]), "an object of groups"),
        (lambda c: c.update(sparsity_config={"format": "sparse-ternary"}), "sparse-ternary"),
        (group({"targets": ["re:.*mlp.*"]}), "no group of quantization_config names it"),
        (group({"targets": "Linear"}), "targets.*a list of names"),
        (group({"weights": None}), "weights must be quantized"),
        (group({"output_activations": {"num_bits": 8}}), "outputs stay floats"),
        (
            group({"input_activations": {"num_bits": 4, "dynamic": True, "strategy": "token"}}),
            "symmetric int8",
        ),
        (group({"input_activations": "int8"}), "input_activations is 'int8'.*an object is right"),
        (group({"twist": 1}), r"config_groups.group_0.twist=1"),
        (weights({"num_bits": 3}), "4 or 8 bits"),
        (weights({"type": "float"}), "type is 'float'"),
        (weights({"strategy": "block"}), "blocks"),
        (weights({"actorder": "group"}), "actorder"),
        (weights({"group_size": 0}), "above 0"),
        (weights({"group_size": 8}), r"weight_scale' is F16 \(\d+, \d\)"),
        (weights({"symmetric": False}), "weight_zero_point' is missing"),
        (weights({"num_bits": 8}), "weight_shape' says"),
    ],
)
def test_what_config_json_says_must_be_understood_and_fit(tmp_path: Path, change: Change, words: str) -> None:
    model = small_model(LLAMA)
    write(model, encode(model, [("int4", 32)], projections(model)), tmp_path)
    config = read_json_object(tmp_path / "config.json")
    change(config["quantization_config"])
    write_json(tmp_path / "config.json", config)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=words):
        open_checkpoint(tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    write(model, encode(model, [("int4", 32), ("int8", 0, 0.1)], projections(model)), tmp_path)
    file = Checkpoint(tmp_path)
    whole = {name: np.array(file.read(name)) for name in file.names()}
    packed = next(n for n in whole if n.endswith("weight_packed")).removesuffix(".weight_packed")
    plain = next(n for n in whole if n.endswith("input_scale")).removesuffix(".input_scale")
    changes: list[tuple[str, Callable[[Any], Any] | None, str]] = [
        (f"{packed}.weight_scale", None, "weight_scale' is missing"),
        (f"{packed}.weight_shape", None, "weight_shape' is missing"),
        (f"{packed}.weight_shape", lambda v: np.asarray([1 << 40, 1 << 40]), "weight_shape' says"),
        (f"{packed}.weight_packed", lambda v: v[:, :-1], "weight_shape' says"),
        (f"{packed}.weight_packed", lambda v: v.astype(np.float32), r"weight_packed' is F32"),
        (f"{packed}.weight_packed", None, "weight_packed' is missing"),
        (f"{packed}.weight_scale", lambda v: v[:1, 0], r"weight_scale' is F16 \(1,\)"),
        (f"{plain}.weight_scale", None, "weight_scale' is missing"),
        (f"{plain}.weight_scale", lambda v: v[:-1], r"weight_scale' is F32 \(\d+, 1\)"),
        (f"{plain}.weight", lambda v: v.astype(np.float32), "weight' is F32"),
        (f"{plain}.input_scale", lambda v: -v, "input_scale' holds"),
        (f"{plain}.input_scale", None, "input_scale' is missing"),
    ]
    for name, change, words in changes:
        tensors = {n: v for n, v in whole.items() if n != name}
        write_weights(tmp_path, tensors if change is None else {**tensors, name: change(whole[name])})
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("zero", [np.int8(8), np.int8(-9), np.float32(0.5)])
def test_zero_points_beyond_4_bits_are_damage(tmp_path: Path, zero: Any) -> None:
    model = small_model(LLAMA)
    write(model, encode(model, [("uint4", 32)], projections(model)), tmp_path)
    config = read_json_object(tmp_path / "config.json")
    groups = config["quantization_config"]["config_groups"]
    config["quantization_config"]["format"] = "int-quantized"
    for of in groups.values():
        of["format"] = "int-quantized"
    write_json(tmp_path / "config.json", config)
    file, tensors = Checkpoint(tmp_path), {}
    for name in file.names():
        module, _, part = name.rpartition(".")
        value = np.array(file.read(name))
        if part == "weight_packed":
            tensors[f"{module}.weight"] = np.zeros(file.read(f"{module}.weight_shape"), np.int8)
        elif part == "weight_zero_point":
            scales = file.info(f"{module}.weight_scale")
            tensors[name] = np.full(scales.shape, zero)
        elif part != "weight_shape":
            tensors[name] = value
    write_weights(tmp_path, tensors)
    source = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="weight_zero_point' holds more than integers of 4 bits"):
        for name in projections(model):
            source.read(name)


def test_a_quantized_model_can_be_written_as_floats(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    coded = encode(model, [("int4", 32)], projections(model))
    write(model, coded, tmp_path)
    source = open_checkpoint(tmp_path)
    assert sorted(source.names()) == sorted(model.state_dict())
    (tmp_path / "floats").mkdir()
    write_weights(tmp_path / "floats", from_checkpoint(source))
    floats = Checkpoint(tmp_path / "floats")
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(floats.read(name), value)
    assert source.content_key() != floats.content_key()
