"""AWQ (version gemm), packed here as its documentation says, without the code under test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gossamer.checkpoint.model_writer import write_config, write_weights
from gossamer.checkpoint.opening import open_checkpoint
from gossamer.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.coded import SIZES, check_served, config_json, opened, projections, small_model

LLAMA = transformers.LlamaConfig(**SIZES)


def pack(integers: torch.Tensor) -> np.ndarray:
    """[rows, n] as words [rows, n / 8], whose nibbles are outputs 0, 2, 4, 6, 1, 3, 5, 7, lowest first."""
    words = torch.zeros(integers.shape[0], integers.shape[1] // 8, dtype=torch.int64)
    for column in range(words.shape[1]):
        for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, column] |= integers[:, 8 * column + output].long() << (4 * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().numpy()


def stored(model: Any, group: int) -> dict[str, np.ndarray]:
    """All projections as AWQ, of random integers and zero points; the model gets their values."""
    random = torch.Generator().manual_seed(5)
    state, out = model.state_dict(), {}
    for name, value in state.items():
        if name not in projections(model):
            out[name] = value.numpy()
            continue
        n, k = value.shape
        integers = torch.randint(0, 16, (k, n), generator=random)
        zeros = torch.randint(0, 16, (k // group, n), generator=random)
        scales = (torch.rand(k // group, n, generator=random) / 100).half()
        of = torch.arange(k) // group
        state[name] = (scales.float()[of] * (integers - zeros[of])).T
        module = name.removesuffix(".weight")
        out |= {
            f"{module}.qweight": pack(integers),
            f"{module}.qzeros": pack(zeros),
            f"{module}.scales": scales.numpy(),
        }
    model.load_state_dict(state)
    return out


def save(directory: Path, model: Any, tensors: dict[str, np.ndarray], **settings: Any) -> None:
    write_weights(directory, tensors)
    quantization = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": None, **settings,
    }  # fmt: skip
    write_config(directory, {**config_json(model), "quantization_config": quantization})


@pytest.mark.parametrize("group", [32, 64])
def test_every_integer_is_where_the_layout_says(tmp_path: Path, group: int) -> None:
    model = small_model(LLAMA)
    save(tmp_path, model, stored(model, group), group_size=group)
    _, source = opened(tmp_path)
    for name in projections(model):
        np.testing.assert_array_equal(source.read(name), model.state_dict()[name])
        np.testing.assert_array_equal(source.read_rows(name, 3, 29), model.state_dict()[name][3:29])
    check_served(tmp_path, {f"uint4-g{group}"})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"version": "gemv"}, "gemv.*AutoAWQ"),
        ({"bits": 8}, "bits is 8"),
        ({"zero_point": False}, "zero_point"),
        ({"group_size": 16}, r"scales.*\(8, 64\) is right"),
        ({"twist": 1}, r"quantization_config.twist=1 is not understood"),
        ({"modules_to_not_convert": ["mlp"]}, r"mlp.down_proj' is quantized.*contradicts itself"),
    ],
)
def test_what_config_json_says_must_be_understood_and_fit(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    model = small_model(LLAMA)
    save(tmp_path, model, stored(model, 32), **settings)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=words):
        open_checkpoint(tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    whole = stored(model, 32)
    name = projections(model)[0].replace(".weight", ".qzeros")
    save(tmp_path, model, {n: v for n, v in whole.items() if n != name})
    with pytest.raises(CheckpointError, match="qzeros' is missing"):
        open_checkpoint(tmp_path)
    save(tmp_path, model, {**whole, name: whole[name][:, :-1]})
    with pytest.raises(CheckpointError, match=r"qzeros' is I32 \(2, 7\); I32 \(2, 8\) is right"):
        open_checkpoint(tmp_path)
