"""Sampling parameters of any type and size: taken, or refused with the name of the one that is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gossamer.engine.request import SamplingParams, token_ids
from gossamer.errors import RequestError


@pytest.mark.parametrize("name", ["n", "top_k", "min_tokens", "max_tokens", "logprobs", "seed"])
@pytest.mark.parametrize("value", [1.5, "a", True, [1], 2.0, float("nan"), 10**400, -(10**400)])
def test_counts_are_whole_numbers_in_range(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "name",
    ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"],
)
@pytest.mark.parametrize("value", ["a", None, True, float("nan"), float("inf"), 10**400, -1e300, []])
def test_numbers_are_finite_and_in_range(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", 5),
        ("stop", (1,)),
        ("stop", [None]),
        ("stop", ""),
        ("stop", ["x" * 10**6]),
        ("stop", ["a"] * 65),
        ("stop_token_ids", 5),
        ("stop_token_ids", ("a",)),
        ("stop_token_ids", "5"),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", [True]),
        ("logit_bias", [1]),
        ("logit_bias", {"5": 1}),
        ("logit_bias", {5.5: 1}),
        ("logit_bias", {5: "b"}),
        ("logit_bias", {5: None}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", {-1: 0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("repetition_penalty", 1e-300),
    ],
)
def test_the_rest_is_checked_too(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} ") as refused:
        SamplingParams(**{name: value})
    assert len(str(refused.value)) < 250


def test_what_numpy_gives_and_none_are_taken() -> None:
    numpy: dict[str, Any] = {
        "n": np.int64(2),
        "temperature": np.float32(0.5),
        "seed": np.uint64(2**64 - 1),
        "stop_token_ids": np.array([3]),
        "logit_bias": {np.int32(4): np.float16(1)},
        "stop": None,
    }
    got = SamplingParams(**numpy)
    assert got == SamplingParams(
        n=2, temperature=0.5, seed=2**64 - 1, stop_token_ids=(3,), logit_bias={4: 1.0}
    )
    assert all(type(i) is int for i in (got.n, got.seed, *got.stop_token_ids, *got.logit_bias))


@pytest.mark.parametrize("value", [5, None, "ab", b"ab", {1: 2}, [1.5], ["a"], [[1]], [None], [False]])
def test_a_prompt_is_a_list_of_whole_numbers(value: Any) -> None:
    with pytest.raises(RequestError, match=r"^prompt .* is not a list of token ids"):
        token_ids("prompt", value)
    assert token_ids("prompt", np.array([1, 2])) == token_ids("prompt", iter([1, 2])) == (1, 2)
