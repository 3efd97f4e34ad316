"""What the engine decides about sampling: seeds, end tokens, and which requests are valid. The choice
of a token is the executor's."""

from __future__ import annotations

import os

from gossamer.engine.request import Request
from gossamer.errors import RequestError

__all__ = ["check_ids", "end_ids", "fresh_seed", "sequence_seed"]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def fresh_seed() -> int:
    """64 random bits, for a request that names no seed."""
    return int.from_bytes(os.urandom(8), "little")


def sequence_seed(seed: int, index: int) -> int:
    """Seed of a request's index-th output, unsigned 64 bits.

    The first keeps the request's own, so that n = 1 gives the first of n > 1; the others are SplitMix64's
    (Steele, Lea and Flood, 2014) index-th draw from it.
    """
    if index == 0:
        return seed & _MASK
    z = (seed + index * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def end_ids(request: Request, vocab: int) -> dict[int, int | None]:
    """Tokens that end an output -> its stop_reason: None for the model's own end, else the stop token.

    End tokens beyond the vocabulary (some configs name them) can never come and are left out.
    """
    ends: dict[int, int | None] = {token: token for token in request.params.stop_token_ids}
    if not request.params.ignore_eos:
        ends.update({token: None for token in request.eos_ids if 0 <= token < vocab})
    return ends


def check_ids(request: Request, vocab: int) -> None:
    """Raises RequestError for an empty prompt or for a token id outside the vocabulary, in the prompt,
    stop_token_ids or logit_bias."""
    params = request.params
    if not request.prompt_ids:
        raise RequestError("the prompt is empty; give at least one token")
    for name, ids in (
        ("prompt", request.prompt_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias),
    ):
        if ids and (min(ids) < 0 or max(ids) >= vocab):
            wrong = next(token for token in ids if not 0 <= token < vocab)
            raise RequestError(f"{name} has token id {wrong}; the model's ids are 0 to {vocab - 1}")
