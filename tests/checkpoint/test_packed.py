"""What all readers of quantized checkpoints share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.checkpoint.codes import Codes
from gossamer.checkpoint.compressed_tensors import pack_integers
from gossamer.checkpoint.packed import half, kernel_format, spread, unpack
from gossamer.config.quantization import GROUPS
from gossamer.errors import CheckpointError, UnsupportedModelError


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_packing_and_unpacking_are_inverse(bits: int, n: int, k: int, seed: int) -> None:
    integers = np.random.default_rng(seed).integers(0, 1 << bits, (n, k)).astype(np.uint8)
    words = pack_integers(integers, bits)
    assert words.dtype == np.int32 and words.shape == (n, -(-k * bits // 32))
    np.testing.assert_array_equal(unpack(words, bits)[:, :k], integers)
    assert not unpack(words, bits)[:, k:].any()


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    group=st.sampled_from([0, 8, 16, 24, 32, 48, 64, 96, 128, 160, 256, 384]),
    k=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_kernels_hold_every_value_or_the_format_is_refused(
    bits: int, symmetric: bool, group: int, k: int, seed: int
) -> None:
    try:
        format, kernel = kernel_format("w", bits, symmetric, group, k)
    except UnsupportedModelError:
        assert (bits == 8 and not symmetric) or (group and group % (16 if symmetric else 32))
        return
    assert kernel in GROUPS[format] or (format, kernel) == ("int8", 0)
    random = np.random.default_rng(seed)
    groups = -(-k // group) if group else 1
    scales = half("w", random.random((3, groups)))
    low, high = (0, 16) if format == "uint4" else (-8, 8) if bits == 4 else (-128, 128)
    integers = random.integers(low, high, (3, k)).astype(np.int8)
    points = random.integers(0, 16, (3, groups)).astype(np.uint8) if format == "uint4" else None
    codes = Codes(
        format=format,
        group=kernel,
        codes=integers,
        scales=spread(scales, group, k, kernel),
        zeros=None if points is None else spread(points, group, k, kernel),
    )
    of = np.arange(k) // (group or k)
    zeros = 0.0 if points is None else points[:, of].astype(np.float32)
    np.testing.assert_array_equal(codes.floats(), scales[:, of] * (integers - zeros))


def test_a_scale_beyond_fp16_is_refused_and_a_nan_is_left_to_be_found() -> None:
    with pytest.raises(CheckpointError, match=r"'w': scale 70000 is beyond 65504"):
        half("w", np.asarray([[1.0, 7e4]]))
    assert np.isnan(half("w", np.asarray([np.nan, 1.0]))[0])
