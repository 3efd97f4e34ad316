"""What a row asks of the sampler, on the device: the fields of its SampleRow (csrc/api.h), what happens to
its logits before it is sampled, and its noise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.backends.cpu.plan import SAMPLE_ROW

__all__ = [
    "LOGPROBS",
    "MIN_P",
    "TARGET",
    "TEMPERATURE",
    "TOP_K",
    "TOP_P",
    "WORDS",
    "field",
    "gumbel_noise",
    "is_treated",
    "treat",
]


def _word(field: str) -> tl.constexpr:
    """Where a field lies in a row of 32-bit words."""
    return tl.constexpr(SAMPLE_ROW.fields[field][1] // 4)  # type: ignore[index]


WORDS: tl.constexpr = tl.constexpr(SAMPLE_ROW.itemsize // 4)
TEMPERATURE: tl.constexpr = _word("temperature")
TOP_P: tl.constexpr = _word("top_p")
MIN_P: tl.constexpr = _word("min_p")
_REPETITION: tl.constexpr = _word("repetition")
_PRESENCE: tl.constexpr = _word("presence")
_FREQUENCY: tl.constexpr = _word("frequency")
TOP_K: tl.constexpr = _word("top_k")
LOGPROBS: tl.constexpr = _word("logprobs")
_SEED: tl.constexpr = _word("seed")
_OUTPUT_INDEX: tl.constexpr = _word("output_index")
_PROMPT: tl.constexpr = _word("prompt_begin")
_OUTPUT: tl.constexpr = _word("output_begin")
_BIAS: tl.constexpr = _word("bias_begin")
_MASK_ROW: tl.constexpr = _word("mask_row")
TARGET: tl.constexpr = _word("target")


@triton.jit
def field(row, FIELD: tl.constexpr):
    return tl.load(row + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def _mix(x):
    """SplitMix64's finaliser, of uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def gumbel_noise(row, ids):
    """The noise of int32 ids for a row's seed and output index: -log(-log1p(-v)), float32."""
    low, high = tl.load(row + _SEED).to(tl.int64) & 0xFFFFFFFF, tl.load(row + _SEED + 1).to(tl.int64)
    seed, index = ((high << 32) | low).to(tl.uint64), tl.load(row + _OUTPUT_INDEX).to(tl.uint64)
    key = _mix(_mix(seed + 0x9E3779B97F4A7C15) + index + 0x9E3779B97F4A7C15)
    bits = (_mix(key + ids.to(tl.uint64)) >> 33).to(tl.int32)
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.9999999403953552)
    # -log(1 - v): by its series where 1 - v would lose v's digits.
    u = 1.0 - v
    near = v * (1.0 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v * (1 / 6))))))
    far = -tl.log(u) * (v / (1.0 - u))
    return -tl.log(tl.where(v < 0.03125, near, far))


@triton.jit
def is_treated(row):
    """Whether anything happens to a row's logits before it is sampled."""
    return (
        (tl.load(row + _BIAS) < tl.load(row + _BIAS + 1))
        | (field(row, _REPETITION) != 1.0)
        | (field(row, _PRESENCE) != 0.0)
        | (field(row, _FREQUENCY) != 0.0)
        | (tl.load(row + _MASK_ROW) >= 0)
    ) & (tl.load(row + TARGET) < 0)


@triton.jit
def _counts(history, begin, end, first, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """How often each of TILE ids from `first` on is in history[begin, end)."""
    counts = tl.zeros([TILE], tl.int32)
    for start in range(begin, end, CHUNK):
        at = start + tl.arange(0, CHUNK)
        ids = tl.load(history + at, mask=at < end, other=-1)
        here = (ids >= first) & (ids < first + TILE)
        counts += tl.histogram(tl.where(here, ids - first, 0), TILE, mask=here)
    return counts


@triton.jit
def treat(
    x, row, history, bias_ids, bias_values, masks, first, vocab, TILE: tl.constexpr, CHUNK: tl.constexpr
):
    """Biases, penalties and mask over the logits x of TILE ids from `first` on."""
    ids = first + tl.arange(0, TILE)
    for i in range(tl.load(row + _BIAS), tl.load(row + _BIAS + 1)):
        x = tl.where(ids == tl.load(bias_ids + i), x + tl.load(bias_values + i), x)
    begin, end = tl.load(row + _OUTPUT), tl.load(row + _OUTPUT + 1)
    outputs = _counts(history, begin, end, first, TILE, CHUNK)
    repetition = field(row, _REPETITION)
    if repetition != 1.0:
        begin, end = tl.load(row + _PROMPT), tl.load(row + _PROMPT + 1)
        seen = outputs + _counts(history, begin, end, first, TILE, CHUNK)
        penalty = tl.zeros_like(x) + repetition
        x = tl.where(seen > 0, tl.where(x > 0, tl.div_rn(x, penalty), x * penalty), x)
    less = field(row, _FREQUENCY) * outputs.to(tl.float32) + field(row, _PRESENCE)
    x = tl.where(outputs > 0, x - less, x)
    mask_row = tl.load(row + _MASK_ROW)
    words = masks + mask_row.to(tl.int64) * ((vocab + 31) // 32) + ids // 32
    allowed = tl.load(words, mask=(tl.zeros_like(ids) + mask_row >= 0) & (ids < vocab), other=-1)
    return tl.where(((allowed >> (ids % 32)) & 1) != 0, x, float("-inf"))
