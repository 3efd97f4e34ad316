"""What to say of a program that memory has no room for: the numbers, and what would fit instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gossamer.backends.cpu.formats import kv_page_bytes
from gossamer.backends.cpu.packing import layout
from gossamer.errors import MemoryBudgetError
from gossamer.graph.ir import Graph
from gossamer.passes.quantization import auto_group
from gossamer.passes.weight_formats import with_formats

if TYPE_CHECKING:
    from gossamer.backends.cpu.program import StepShape

__all__ = ["too_large"]

_Sizes = Callable[[Graph], int]

_SCORES = (
    "the workspace holds the scores of attention, which grow with --max-model-len and "
    "--max-num-batched-tokens, and which FlashAttention does without (leave out --no-flash-attention); "
)


def too_large(
    budget: int,
    graph: Graph,
    shape: StepShape,
    parts: Mapping[str, int],
    *,
    flash: bool,
    weight_bytes: _Sizes = lambda graph: layout(graph)[1],
    where: str = "",
) -> MemoryBudgetError:
    """The error for a program in a budget that is too small, with what would fit. parts: bytes by name,
    "weights" and "kv" among them. flash: no scores of attention are. weight_bytes: of a graph's weights, as
    the backend packs them. where: whose memory it is, as " on ..."."""
    need = sum(parts.values())
    listed = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items())
    room = budget - (need - parts["weights"] - parts["kv"])
    room -= shape.padding * kv_page_bytes(graph, shape.page_size, shape.kv_dtype)
    return MemoryBudgetError(
        f"{_mib(need)} are needed ({listed}) and {_mib(budget)} are there{where}; "
        + ("" if flash else _SCORES)
        + _what_fits(graph, shape, budget, room, parts["weights"], weight_bytes)
    )


def _what_fits(
    graph: Graph, shape: StepShape, budget: int, room: int, weights: int, weight_bytes: _Sizes
) -> str:
    """What to ask for instead, never more than was asked for. room: bytes of the budget that are there for
    weights and KV together."""
    page = kv_page_bytes(graph, shape.page_size, shape.kv_dtype)

    def kv(left: int) -> tuple[str, str]:
        pages = min(left // page, shape.pages - shape.padding)
        return f"--kv-bytes {pages * page}", f"{min(pages * shape.page_size, graph.reach)}"

    if room - weights >= page:
        size, length = kv(room - weights)
        return (
            f"{size} fits, with a --max-model-len of at most {length}; "
            "a lower --max-num-batched-tokens or --max-num-seqs leaves more for it"
        )
    least, stored = weights, "as they are"
    for format in ("int8", "int4"):
        size_there = weight_bytes(_in_format(graph, format))
        if size_there < least:
            least, stored = size_there, f"as {format}"
        if room - least >= page:
            size, length = kv(room - least)
            whole = (room - least) // page >= shape.pages - shape.padding
            return f"--quantization {format} fits, which takes {_mib(least)} for weights" + (
                "" if whole else f", with {size} and a --max-model-len of at most {length}"
            )
    rest = budget - room
    return (
        f"nothing fits: {_mib(least + page + rest)} are the least (weights {stored} {_mib(least)}, one KV "
        f"page {_mib(page)}, {_mib(rest)} beside), {_mib(least + page - room)} more than there are; "
    ) + (
        "take a smaller model"
        if room < least
        else "lower --max-num-seqs and --max-num-batched-tokens or take a smaller model"
    )


def _in_format(graph: Graph, format: str) -> Graph:
    """The graph with its matrices in a quantized format."""
    group = auto_group(graph, format)
    return with_formats(graph, lambda weight: weight.stored_as(format, group))


def _mib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
