"""What tests of sampling draw: logits, and the parameters of rows, for every backend the same."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st


def logits(rows: int, vocab: int, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng([seed, vocab]).standard_normal((rows, vocab))).astype(np.float32)


OPTIONS = {
    "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    "top_k": st.sampled_from([0, 1, 3, 40, 10**6]),
    "top_p": st.sampled_from([1.0, 0.3, 0.9]),
    "min_p": st.sampled_from([0.0, 0.1, 1.0]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
    "presence_penalty": st.sampled_from([0.0, 1.0]),
    "frequency_penalty": st.sampled_from([0.0, -0.5, 0.6]),
    "seed": st.integers(0, 2**64 - 1),
    "output_index": st.integers(0, 10**6),
    "prompt_ids": st.lists(st.integers(0, 29), max_size=8),
    "output_ids": st.lists(st.integers(0, 29), max_size=8),
    "bias": st.dictionaries(st.integers(0, 29), st.sampled_from([-100.0, 5.0, float("-inf")]), max_size=4),
}
"""Parameter of `sample_row` -> what it may be, over a vocabulary of 30 at least."""
