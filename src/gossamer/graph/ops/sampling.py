"""From a row of logits to a token: the specification of the native sampler (csrc/generic/sample.h).

Not a graph op, since its inputs are requests, not tensors; it stands here as their oracle. Sampling is
Gumbel-max (Gumbel 1954; Maddison et al. 2014) with noise that is a pure function of (seed, output index,
token id): SplitMix64's finaliser (Steele et al. 2014) as a counter-based generator. No state is kept, so
the tokens of a request do not depend on its batch, and a draft verified by id equality is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["gumbel_noise", "sample_row"]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser, modulo 2^64."""
    import numpy as np

    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gumbel_noise(seed: int, output_index: int, vocab: int) -> npt.NDArray[np.float64]:
    """Noise of every token id [vocab]: -log(-log(1 - v)) with v uniform in (0, 1)."""
    import numpy as np

    state = np.array([(seed + _GOLDEN) & _MASK], np.uint64)
    key = _mix(_mix(state) + np.uint64((output_index + _GOLDEN) & _MASK))
    bits = _mix(np.arange(vocab, dtype=np.uint64) + key) >> np.uint64(33)
    v = np.minimum((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-31), np.float32(1 - 2**-24))
    noise: npt.NDArray[np.float64] = -np.log(-np.log1p(-v.astype(np.float64)))
    return noise


def sample_row(
    logits: Any,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    output_index: int = 0,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    bias: Mapping[int, float] | None = None,
    allowed: Any = None,
) -> tuple[int, str]:
    """(token, ""), or (-1, "nan" or "empty"). logits: float32 [vocab]; allowed: bool [vocab] or None.

    In order: logit_bias, repetition penalty over prompt and output (Keskar et al. 2019), presence and
    frequency penalties over the output, mask, temperature (0: argmax), top-k, top-p (Holtzman et al.
    2020), min-p (Nguyen et al. 2024). The lowest id wins among equals.
    """
    import numpy as np

    x = np.array(logits, dtype=np.float32)
    if np.isnan(x).any() or np.isposinf(x).any():
        return -1, "nan"
    for token, value in (bias or {}).items():
        x[token] += np.float32(value)
    for token in {*prompt_ids, *output_ids} if repetition_penalty != 1.0 else ():
        x[token] = x[token] / repetition_penalty if x[token] > 0 else x[token] * repetition_penalty
    ids, counts = np.unique(np.asarray(output_ids, np.int64), return_counts=True)
    x[ids] -= np.float32(presence_penalty) + np.float32(frequency_penalty) * counts.astype(np.float32)
    if allowed is not None:
        x[~allowed] = -np.inf
    if not np.isfinite(x).any():
        return -1, "empty"
    if temperature == 0:
        return int(x.argmax()), ""
    z = (x.astype(np.float64) - x.max()) / temperature
    keep = np.isfinite(z)
    order = np.lexsort((np.arange(len(z)), -z))
    if top_k:
        keep[order[top_k:]] = False
    if top_p < 1.0:
        kept = order[keep[order]]
        mass = np.exp(z[kept])
        # The smallest head of the sorted list whose mass reaches top_p; always one at least.
        head = int(np.searchsorted(mass.cumsum(), top_p * mass.sum())) + 1
        keep[kept[head:]] = False
    if min_p > 0.0:
        keep &= np.exp(z) >= min_p
    return int(np.where(keep, z + gumbel_noise(seed, output_index, len(z)), -np.inf).argmax()), ""
