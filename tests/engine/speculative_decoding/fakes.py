"""Sequences and a state as the engine keeps them, as far as speculation looks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from gossamer.engine.request import SamplingParams
from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.step import Sampling


@dataclass
class Config:
    method: str = "ngram"
    num_speculative_tokens: int = 4
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4
    tree_width: int = 1
    adaptive: bool = True


@dataclass
class Live:
    ends: Collection[int] = ()


@dataclass
class Seq:
    """pending: how many of its tokens the target has not computed."""

    id: int
    prompt_ids: tuple[int, ...]
    output_ids: list[int] = field(default_factory=list)
    limit: int = 1000
    pending: int = 1
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=None))
    live: Live = field(default_factory=Live)
    finish_reason: Any = None
    grammar: Any = None
    draft: Draft | None = None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def computed(self) -> int:
        return self.length - self.pending

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.params, self.id, self.prompt_ids, self.output_ids, tuple(self.live.ends))

    def tokens(self, start: int, stop: int) -> list[int]:
        return [*self.prompt_ids, *self.output_ids][start:stop]


@dataclass
class State:
    running: list[Seq]
    waiting: tuple[int, ...] = ()
    max_num_seqs: int = 8
