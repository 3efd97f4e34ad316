from __future__ import annotations

import pytest

from gossamer.engine.sampling import check_ids, end_ids, fresh_seed, sequence_seed
from gossamer.errors import RequestError
from tests.engine.serving import request


def test_the_first_output_keeps_the_seed_and_the_others_differ() -> None:
    assert sequence_seed(7, 0) == 7
    assert sequence_seed(-1, 0) == 2**64 - 1
    seeds = {sequence_seed(seed, i) for seed in range(20) for i in range(1, 128)}
    assert len(seeds) == 20 * 127
    assert all(0 <= s < 2**64 for s in seeds)


def test_splitmix64_is_the_published_one() -> None:
    assert sequence_seed(1234567, 1) == 6457827717110365317  # Vigna's splitmix64.c, first output
    assert sequence_seed(1234567, 2) == 3203168211198807973


def test_fresh_seeds_differ() -> None:
    assert len({fresh_seed() for _ in range(100)}) == 100


def test_what_ends_an_output() -> None:
    assert end_ids(request("a", eos=(4, 99), stop_token_ids=(5,)), 50) == {4: None, 5: 5}
    assert end_ids(request("a", eos=(4,), stop_token_ids=(4,), ignore_eos=True), 50) == {4: 4}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (request("a", ()), "empty"),
        (request("a", (1, 50)), "prompt has token id 50"),
        (request("a", (-1,)), "prompt has token id -1"),
        (request("a", stop_token_ids=(3, 60)), "stop_token_ids has token id 60"),
        (request("a", logit_bias={70: 1.0}), "logit_bias has token id 70"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(bad: object, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        check_ids(bad, 50)  # type: ignore[arg-type]
