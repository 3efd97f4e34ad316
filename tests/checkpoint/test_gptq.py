"""GPTQ, by its documented layout: packed and unpacked here in torch, without the code under test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.codes import CodedTensor, Codes
from gossamer.checkpoint.gptq import write_gptq
from gossamer.checkpoint.model_writer import write_config, write_weights
from gossamer.checkpoint.opening import open_checkpoint
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.coded import (
    IDS,
    SIZES,
    check_codes,
    check_served,
    config_json,
    encode,
    opened,
    projections,
    small_model,
)

LLAMA = transformers.LlamaConfig(**SIZES)


def pack(integers_KN: torch.Tensor, bits: int) -> torch.Tensor:
    """Down the first axis, the first integer in the lowest bits."""
    k, n = integers_KN.shape
    words = torch.zeros(k * bits // 32, n, dtype=torch.int64)
    for i in range(k):
        words[i * bits // 32] |= integers_KN[i].long() << (i * bits % 32)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[w, n] words as [w * 32 / bits, n] integers."""
    return torch.stack(
        [(w.long() >> (i * bits)) & ((1 << bits) - 1) for w in words for i in range(32 // bits)]
    )


def dequantized(file: Checkpoint, module: str, bits: int, first: bool = True) -> torch.Tensor:
    """Values [n, k], as AutoGPTQ's dequantization says."""
    part = {
        p: torch.from_numpy(file.read(f"{module}.{p}").copy())
        for p in ("qweight", "qzeros", "scales", "g_idx")
    }
    integers, group = unpack(part["qweight"], bits), part["g_idx"].long()
    zeros = unpack(part["qzeros"].T, bits).T + int(first)
    return (part["scales"].float()[group] * (integers - zeros[group])).T


@pytest.mark.parametrize("format, group", [("int4", 32), ("int4", 64), ("uint4", 32)])
def test_what_is_written_decodes_and_is_served(tmp_path: Path, format: str, group: int) -> None:
    model = small_model(LLAMA)
    coded = encode(model, [(format, group)], projections(model))
    if format == "uint4":
        coded = {name: lifted(tensor) for name, tensor in coded.items()}
    floats = {n: v.numpy() for n, v in model.state_dict().items() if n not in coded}
    write_gptq(tmp_path, config_json(model), floats, coded)
    file = Checkpoint(tmp_path)
    for name, tensor in coded.items():
        values = dequantized(file, name.removesuffix(".weight"), 4)
        np.testing.assert_array_equal(values, tensor.make().floats())
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).quantization_config
    parsed = transformers.GPTQConfig.from_dict(dict(theirs))
    assert (parsed.bits, parsed.group_size, parsed.sym) == (4, group, format == "int4")
    check_codes(tmp_path, coded)
    check_served(tmp_path, {f"{format}-g{group}"})


def lifted(tensor: CodedTensor) -> CodedTensor:
    """The same without zero points of 0, which the first format lacks."""
    codes = tensor.make()
    assert codes.zeros is not None
    changed = Codes(
        format=codes.format,
        group=codes.group,
        codes=codes.codes,
        scales=codes.scales,
        zeros=np.maximum(codes.zeros, 1),
    )
    return CodedTensor(format=tensor.format, group=tensor.group, shape=tensor.shape, make=lambda: changed)


def stored(
    model: Any, bits: int, group: int, *, zeros: int | None = None, first: bool = True, order: Any = None
) -> dict[str, np.ndarray]:
    """All projections as GPTQ, of random integers; the model gets their values."""
    random = torch.Generator().manual_seed(3)
    state, out = model.state_dict(), {}
    for name, value in state.items():
        if name not in projections(model):
            out[name] = value.numpy()
            continue
        n, k = value.shape
        run = k if group < 0 else group
        g_idx = torch.arange(k) // run if order is None else (torch.arange(k) // run)[order(k)]
        integers = torch.randint(0, 1 << bits, (k, n), generator=random)
        points = torch.randint(1, 1 << bits, (k // run, n), generator=random)
        points = points if zeros is None else torch.full_like(points, zeros)
        scales = (torch.rand(k // run, n, generator=random) / (50 << bits)).half()
        state[name] = (scales.float()[g_idx] * (integers - points[g_idx])).T
        module = name.removesuffix(".weight")
        out |= {
            f"{module}.qweight": pack(integers, bits).numpy(),
            f"{module}.qzeros": pack((points - int(first)).T, bits).T.contiguous().numpy(),
            f"{module}.scales": scales.numpy(),
            f"{module}.g_idx": g_idx.int().numpy(),
        }
    model.load_state_dict(state)
    return out


def save(directory: Path, model: Any, tensors: dict[str, np.ndarray], **settings: Any) -> None:
    write_weights(directory, tensors)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, **settings}
    write_config(directory, {**config_json(model), "quantization_config": quantization})


@pytest.mark.parametrize(
    "bits, group, zeros, first, format",
    [
        (4, 32, 8, True, "int4-g32"),
        (4, 64, None, True, "uint4-g64"),
        (4, -1, None, False, "uint4-g{}"),
        (4, 16, 8, True, "int8-g16"),
        (8, 32, 128, True, "int8-g32"),
        (8, 64, 128, False, "int8-g32"),
        (8, -1, 128, True, "int8"),
    ],
)
def test_checkpoints_of_every_kind(
    tmp_path: Path, bits: int, group: int, zeros: int | None, first: bool, format: str
) -> None:
    model = small_model(LLAMA)
    tensors = stored(model, bits, group, zeros=zeros, first=first)
    kind = "gptq" if first else "gptq_v2"
    save(tmp_path, model, tensors, bits=bits, group_size=group, sym=zeros is not None, checkpoint_format=kind)
    _, source = opened(tmp_path)
    for name in projections(model):
        np.testing.assert_array_equal(source.read(name), model.state_dict()[name])
    check_served(tmp_path, {format.format(g) for g in (64, 128)})


def test_early_files_lie_beside_config_json(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    save(tmp_path, model, stored(model, 4, 32, zeros=8))
    config = config_json(model)
    write_config(tmp_path, config)
    (tmp_path / "quantize_config.json").write_text(
        '{"bits": 4, "group_size": 32, "damp_percent": 0.01, "sym": true}'
    )
    name = projections(model)[0]
    np.testing.assert_array_equal(opened(tmp_path)[1].read(name), model.state_dict()[name])


@pytest.mark.parametrize(
    "bits, zeros, format", [(4, 8, "int4-g32"), (4, None, "uint4-g32"), (8, 128, "int8-g32")]
)
def test_groups_out_of_order_get_their_inputs_in_order(
    tmp_path: Path, bits: int, zeros: int | None, format: str
) -> None:
    model = small_model(LLAMA)

    def order(k: int) -> torch.Tensor:
        return torch.randperm(k, generator=torch.Generator().manual_seed(k))

    tensors = stored(model, bits, 32, zeros=zeros, order=order)
    save(tmp_path, model, tensors, desc_act=True, bits=bits, sym=zeros is not None)
    graph, source = opened(tmp_path)
    for name in projections(model):
        np.testing.assert_array_equal(source.read(name), model.state_dict()[name])
        assert source.stored(name) == ("f32", 0)
    # Projections of one input are of one order here, so that they share it and still merge.
    assert sum(node.op == "take_columns" for node in graph.nodes) == 4
    check_served(tmp_path, {format})
    logits = ReferenceModel.load(graph, source).logits(IDS)
    plain = {n: replace(w, format="f32", group=0) for n, w in graph.weights.items()}
    exact = ReferenceModel.load(replace(graph, weights=plain), source).logits(IDS)
    torch.testing.assert_close(exact, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_an_order_that_changes_nothing_costs_nothing(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    save(tmp_path, model, stored(model, 4, 32, zeros=8), desc_act=True)
    graph, source = opened(tmp_path)
    assert source.stored(projections(model)[0]) == ("int4", 32)
    assert not any(node.op == "take_columns" for node in graph.nodes)


def test_groups_that_lack_inputs_are_damage(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    tensors = stored(model, 4, 32, zeros=8)
    name = next(n for n in tensors if n.endswith("g_idx"))
    tensors[name] = np.zeros_like(tensors[name])
    save(tmp_path, model, tensors, desc_act=True)
    with pytest.raises(CheckpointError, match="does not give every group its 32 inputs"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"bits": 3}, "bits is 3: 4 or 8"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 24}, r"scales.*\(6, 64\) is right"),
        ({"checkpoint_format": "marlin"}, "marlin.*gptq_v2"),
        ({"dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
        ({"twist": 1}, "quantization_config.twist=1 is not understood"),
        ({"quant_method": "aqlm"}, "aqlm.*awq, bitsandbytes"),
        ({"checkpoint_format": "gptq_v2"}, "other zero points than 8"),
        ({"bits": 8}, r"scales.*\(2, 64\) is right"),
    ],
)
def test_what_config_json_says_must_be_understood_and_fit(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    model = small_model(LLAMA)
    save(tmp_path, model, stored(model, 4, 32, zeros=8), **settings)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=words):
        open_checkpoint(tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    whole = stored(model, 4, 32, zeros=8)
    module = projections(model)[0].removesuffix(".weight")

    def damaged(part: str, change: Any) -> dict[str, np.ndarray]:
        name = f"{module}.{part}"
        return {
            **{n: v for n, v in whole.items() if n != name},
            **({} if change is None else {name: change(whole[name])}),
        }

    for part, change, words in [
        ("scales", None, "scales.*missing"),
        ("qzeros", None, "qzeros.*missing"),
        ("scales", lambda v: v[:1], r"scales.*\(1, 64\).*\(2, 64\)"),
        ("qweight", lambda v: v.astype(np.int64), "qweight.*I64.*I32"),
        ("g_idx", lambda v: v[:-1], "g_idx.*63"),
    ]:
        save(tmp_path, model, damaged(part, change))
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path)
    save(tmp_path, model, damaged("scales", lambda v: np.full_like(v, np.nan)))
    with pytest.raises(CheckpointError, match="NaN"):
        open_checkpoint(tmp_path).read_codes(f"{module}.weight", 0, 8)
    save(tmp_path, model, {n: v for n, v in whole.items() if ".q" not in n[-9:]})
    with pytest.raises(CheckpointError, match=r"no tensor's name ends in .qweight"):
        open_checkpoint(tmp_path)


def test_what_gptq_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    name = projections(model)[0]
    with pytest.raises(CheckpointError, match="one group throughout"):
        write_gptq(
            tmp_path, config_json(model), {}, encode(model, [("int4", 32), ("int4", 64)], projections(model))
        )
    with pytest.raises(CheckpointError, match=r"lm_head.*outside of the layers"):
        write_gptq(tmp_path, config_json(model), {}, encode(model, [("int4", 32)], ["lm_head.weight"]))
    with pytest.raises(CheckpointError, match="zero point of 0"):
        write_gptq(tmp_path, config_json(model), {}, encode(model, [("uint4", 32)], [name]))
