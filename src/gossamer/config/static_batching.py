"""Static batching: the honest baseline that continuous batching is measured against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticBatching:
    """A batch is admitted whole and runs until its last request has finished.

    padded: prompts are padded to the batch's longest and finished rows keep computing (what a plain
    `model.generate` does; like it, it looks up no prefixes). False: ragged, no padding, finished rows are
    dropped. length_buckets: a batch takes the first in line and those whose prompts are most like it in
    length, at most twice or half as long.
    """

    padded: bool = False
    length_buckets: bool = False
