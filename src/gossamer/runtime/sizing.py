"""How much KV memory there is to be, and so how long a sequence may grow."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.backends.cpu.formats import kv_page_bytes
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError, MemoryBudgetError
from gossamer.graph.ir import Graph

__all__ = ["KVPlan", "plan_kv", "step_rows"]

_MIB = 1 << 20
_LOGITS = 64 << 20  # bytes that the rows of drafts may make of the logits
_DRAFT_ROWS = 64  # that there is room for whatever the vocabulary
_LEAST_ROWS = 16  # or a prompt's tokens are scored one a step where one sequence runs


@dataclass(frozen=True, slots=True)
class KVPlan:
    """page_size in tokens; pages of each KV group; the longest sequence that may run."""

    page_size: int
    pages: int
    max_model_len: int


def plan_kv(graph: Graph, config: EngineConfig, budget: int) -> KVPlan:
    """Pages for max_num_seqs sequences of max_model_len, within kv_bytes (default: an eighth of budget).
    kv_bytes that was asked for is taken as a whole where a prefix cache makes use of it.

    A max_model_len that was asked for must fit at least once; the model's own is cut to what does.
    Raises MemoryBudgetError with the numbers otherwise, ConfigError where the model's positions end earlier.
    """
    limit = config.kv_bytes if config.kv_bytes is not None else budget // 8
    wanted = config.max_model_len or graph.max_positions
    if wanted > graph.reach:
        raise ConfigError(
            f"max_model_len {wanted} is beyond the {graph.reach} positions that this model serves; lower it, "
            "or stretch them with rope_scaling in config.json where the model has rotary positions"
        )
    asked = config.max_model_len is not None
    unit = 16 if config.paged_attention is None else config.paged_attention.page_size
    unit_bytes = kv_page_bytes(graph, unit, config.kv_dtype)
    fits = limit // unit_bytes * unit
    if config.paged_attention is not None:
        size, most = unit, config.max_num_seqs * _ceil(wanted, unit)
    else:
        if not asked:
            wanted = min(wanted, max(1, fits // config.max_num_seqs))
        size, most = _ceil(wanted, unit) * unit, config.max_num_seqs
    pages = limit // (unit_bytes * size // unit)
    if config.kv_bytes is None or config.prefix_cache is None:  # prefixes take all that was asked for
        pages = min(pages, most)
    if asked and config.kv_bytes is None:
        pages = max(pages, _ceil(wanted, size))
    length = min(wanted, pages * size)
    if length < 1 or (asked and length < wanted):
        need = _ceil(wanted, unit) * unit_bytes
        raise MemoryBudgetError(
            f"one sequence of {wanted} tokens needs {need / _MIB:.1f} MiB of {config.kv_dtype} KV memory and "
            f"{limit / _MIB:.1f} MiB are given; "
            + (
                f"at most --max-model-len {fits} fits"
                if fits
                else f"nothing fits: raise --kv-bytes to {unit_bytes} at least"
            )
        )
    return KVPlan(size, pages, length)


def step_rows(config: EngineConfig, vocab: int) -> int:
    """Most rows that a step samples: one of each sequence, 16 where these are fewer (scores of prompts need
    rows too), and with speculation those of drafts, as far as their logits stay within 64 MiB."""
    speculative = config.speculative_decoding
    least = max(config.max_num_seqs, min(config.max_num_batched_tokens, _LEAST_ROWS))
    if speculative is None:
        return least
    every = config.max_num_seqs * (1 + speculative.num_speculative_tokens)
    room = max(config.max_num_seqs + _DRAFT_ROWS, _LOGITS // (4 * vocab))
    return max(least, min(config.max_num_batched_tokens, every, room))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
