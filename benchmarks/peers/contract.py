"""What a peer is. A peer's file imports nothing but this and the standard library at its top: it is read by
the runner, in Gossamer's environment, and by `child`, in the peer's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = ["PEERS", "Format", "Limits", "Peer", "PeerError", "Session", "Timing", "get_peer"]

PEERS = ("gossamer", "llama_cpp", "openvino", "transformers", "ort_genai", "vllm")
"""Modules beside this one, in the order of the table."""


class PeerError(Exception):
    """A peer that cannot be installed, prepared or run; the message is what the report says of it."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way a peer stores weights. bits: nominal, by which peers are compared; head: how the output head
    and embedding are stored, where that is not the same format; default: whether it is what the peer's own
    tools give when nothing is asked for."""

    name: str
    bits: int
    head: str = "same"
    default: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What a session must hold: threads, sequences at once, tokens of each (prompt and output)."""

    threads: int
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """One generation. prefill_s: from submit to the last sequence's first token; decode_s: from there to the
    end; decode_tokens: those that came in decode_s."""

    prefill_s: float
    decode_s: float
    decode_tokens: int


class Session(Protocol):
    """A loaded model."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        """Continues all prompts greedily and together by exactly new_tokens tokens, whatever they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """name: as tables show it; requirements: what pip installs into the peer's environment (none: it runs in
    this one); install_env, run_env: environment variables, where {threads} is the number of threads;
    unwanted: packages to remove after the install; prepare(checkpoint, target, format) makes the directory or
    file `target` that load(target, format, limits) reads; note: what a reader of the figures must know."""

    name: str
    requirements: tuple[str, ...]
    formats: tuple[Format, ...]
    prepare: Callable[[Path, Path, str], None]
    load: Callable[[Path, str, Limits], Session]
    install_args: tuple[str, ...] = ()
    install_env: Mapping[str, str] = field(default_factory=dict)
    run_env: Mapping[str, str] = field(default_factory=dict)
    unwanted: tuple[str, ...] = ()
    note: str = ""


def get_peer(module: str) -> Peer:
    """The peer of one of PEERS (or of any dotted module name, for tests)."""
    found: Any = importlib.import_module(module if "." in module else f"benchmarks.peers.{module}")
    peer = found.PEER
    assert isinstance(peer, Peer)
    return peer
