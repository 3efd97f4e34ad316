"""Blocks of GGUF against the gguf package, which is the oracle: bit for bit, both ways."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.checkpoint.gguf_blocks import BLOCKS, BY_NAME, quantize_q4_0, quantize_q8_0
from gossamer.graph.ops.formats import round_weight

QUANTIZED = [name for name, (_, block) in BY_NAME.items() if block.size > 1]
SERVED_EXACTLY = {"Q8_0", "Q4_0", "Q5_0"}


def random_records(name: str, rows: int, seed: int) -> np.ndarray:
    """Random bytes, with scales that are numbers."""
    rng = np.random.default_rng(seed)
    block = BY_NAME[name][1]
    raw = rng.integers(0, 256, (rows, 512 // block.size * block.bytes), dtype=np.uint8)
    records = raw.view(block.record)
    for field in {"d", "m"} & set(records.dtype.names or ()):
        records[field] = (rng.standard_normal(records.shape) * 0.01).astype(np.float16)
    return records


def by_gguf(name: str, records: np.ndarray) -> np.ndarray:
    raw = records.view(np.uint8).reshape(len(records), -1)
    return np.asarray(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]))


def test_numbers_and_sizes_are_those_of_the_format() -> None:
    for kind, block in BLOCKS.items():
        own = gguf.GGMLQuantizationType(kind)
        assert (block.name, (block.size, block.bytes)) == (own.name, gguf.GGML_QUANT_SIZES[own])


@pytest.mark.parametrize("name", QUANTIZED)
def test_blocks_dequantize_bit_for_bit(name: str) -> None:
    records = random_records(name, 24, 1)
    assert np.array_equal(
        BY_NAME[name][1].decode(records).view(np.int32), by_gguf(name, records).view(np.int32)
    )


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_say_what_the_blocks_say(name: str) -> None:
    records = random_records(name, 24, 2)
    block, want = BY_NAME[name][1], by_gguf(name, records)
    codes = block.read_codes(records)
    assert (codes.format, codes.group) == block.served
    assert codes.codes.dtype == np.int8 and codes.codes.shape == want.shape
    assert np.array_equal(codes.scales, codes.scales.astype(np.float16))
    assert block.exact == (name in SERVED_EXACTLY)
    if block.exact:
        assert np.array_equal(codes.floats(), want)
    elif name == "Q6_K":  # only the scale is rounded, to 11 bits or to the last one of the subnormals
        assert np.abs(codes.floats() - want).max() <= np.abs(want).max() * 2**-11 + 32 * 2**-25
    else:
        assert np.array_equal(codes.floats(), round_weight(torch.from_numpy(want), "int8", 32).numpy())


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
@settings(max_examples=60, deadline=None)
def test_floats_are_rounded_bit_for_bit(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((6, 128)) * size).astype(np.float32)
    values[0] = 0
    values[1] = np.round(values[1] / size * 4) * size / 4  # ties
    values[2, :32], values[2, 32:64] = size, -size
    for name, ours in (("Q8_0", quantize_q8_0), ("Q4_0", quantize_q4_0)):
        want = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
        assert np.array_equal(ours(values), want), name
