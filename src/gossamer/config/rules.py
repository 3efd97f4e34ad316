"""What a combination of choices must hold to, as data: why one does not, and what would mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from gossamer.config.continuous_batching import ContinuousBatching
from gossamer.config.dynamic_batching import DynamicBatching
from gossamer.config.dynamic_shapes import DynamicShapes
from gossamer.config.flash_attention import FlashAttention
from gossamer.config.memory_reuse import MemoryReuse
from gossamer.config.paged_attention import PagedAttention
from gossamer.config.quantization import Quantization
from gossamer.config.speculative_decoding import SpeculativeDecoding
from gossamer.config.static_batching import StaticBatching

if TYPE_CHECKING:
    from gossamer.config.engine import EngineConfig

__all__ = ["BATCHING", "RULES", "Change", "Choices", "Rule"]

Change = tuple[str, Any]
"""(choice, value). A choice is a field of EngineConfig, or "batching" for the pair of which one is on."""
BATCHING = ("continuous_batching", "static_batching")
"""One of the two is on."""
_TIER = 1 << 30


class Choices:
    """The fields of a configuration, some of them changed; nothing is checked."""

    __slots__ = ("_changes", "_config")

    def __init__(self, config: EngineConfig, changes: Mapping[str, Any]) -> None:
        self._config, self._changes = config, changes

    def __getattr__(self, name: str) -> Any:
        if name == "batching":
            return (self.continuous_batching, self.static_batching)
        if "batching" in self._changes and name in BATCHING:
            return self._changes["batching"][BATCHING.index(name)]
        return self._changes[name] if name in self._changes else getattr(self._config, name)

    def but(self, changes: Mapping[str, Any]) -> Choices:
        """With these changes, too."""
        return Choices(self._config, {**self._changes, **changes})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a combination must hold to. name: for people who look for it; kind: the first technique needs
    something of the others or of the engine, or they exclude each other; techniques: names of cards, none
    for the engine's own limits; says: the rule in words.

    reason: why these choices break it; repairs: changes of one choice that mend it, the likeliest first.
    Both are asked where it does not hold alone.
    """

    name: str
    kind: Literal["needs", "excludes"]
    techniques: tuple[str, ...]
    says: str
    holds: Callable[[Choices], bool]
    reason: Callable[[Choices], str]
    repairs: Callable[[Choices], Iterable[Change]]


def _reference(c: Choices) -> bool:
    return bool(c.backend == "reference")


def _not_cpu(c: Choices) -> bool:
    return bool(c.backend != "cpu")


def _swaps(c: Choices) -> bool:
    return c.paged_attention is not None and c.paged_attention.swap_bytes is not None


def _goal(c: Choices) -> float | None:
    return None if c.dynamic_batching is None else c.dynamic_batching.itl_goal_ms


def _without_goal(c: Choices) -> Change:
    wait = c.dynamic_batching.max_wait_ms
    return "dynamic_batching", None if wait is None else DynamicBatching(max_wait_ms=wait)


def _one_batching(c: Choices) -> Iterable[Change]:
    continuous, static = c.batching
    ways = [(continuous or ContinuousBatching(), None), (None, static or StaticBatching())]
    if static is not None and continuous == ContinuousBatching():
        ways.reverse()  # the one that is there unasked gives way
    return [("batching", way) for way in ways]


def _tier(c: Choices) -> Iterable[Change]:
    recompute = ("batching", (replace(c.continuous_batching, preempt_by="recompute"), None))
    tier = ("paged_attention", replace(c.paged_attention or PagedAttention(), swap_bytes=_TIER))
    return (recompute, tier) if c.paged_attention is None else (tier, recompute)


def _ngram(c: Choices) -> SpeculativeDecoding:
    return SpeculativeDecoding(
        method="ngram", num_speculative_tokens=c.speculative_decoding.num_speculative_tokens
    )


_CPU: Change = ("backend", "cpu")
_CONTINUOUS: Change = ("batching", (ContinuousBatching(), None))

RULES: tuple[Rule, ...] = (
    Rule(
        name="stored once",
        kind="excludes",
        techniques=("quantization", "mixed_precision"),
        says="both say how weights are stored; --weight-format mixes them matrix by matrix",
        holds=lambda c: c.quantization is None or c.mixed_precision is None,
        reason=lambda c: (
            f"quantization {c.quantization} and mixed precision {c.mixed_precision.dtype} both "
            "say how weights are stored (what is not quantized is float32)"
        ),
        repairs=lambda c: (("mixed_precision", None), ("quantization", None)),
    ),
    Rule(
        name="one batching",
        kind="excludes",
        techniques=("continuous_batching",),
        says="static batching, its baseline, runs in its place",
        holds=lambda c: (c.continuous_batching is None) != (c.static_batching is None),
        reason=lambda c: (
            "continuous and static batching are both on, and one runs requests"
            if c.static_batching
            else "continuous and static batching are both off, and one of them runs requests"
        ),
        repairs=_one_batching,
    ),
    Rule(
        name="prefixes are pages",
        kind="needs",
        techniques=("paged_attention",),
        says="the prefix cache needs pages: contiguous KV has none to share",
        holds=lambda c: c.prefix_cache is None or c.paged_attention is not None,
        reason=lambda c: "the prefix cache shares pages, and contiguous KV has none",
        repairs=lambda c: (("prefix_cache", None), ("paged_attention", PagedAttention())),
    ),
    Rule(
        name="swap has a tier",
        kind="needs",
        techniques=("continuous_batching", "paged_attention"),
        says="preemption by swap needs a slower tier for pages (--swap-bytes)",
        holds=lambda c: (
            c.continuous_batching is None or c.continuous_batching.preempt_by != "swap" or _swaps(c)
        ),
        reason=lambda c: (
            "preemption by swap needs a slower tier"
            + (
                " for pages, and contiguous KV has none"
                if c.paged_attention is None
                else ", and there is none"
            )
        ),
        repairs=_tier,
    ),
    Rule(
        name="static does not speculate",
        kind="needs",
        techniques=("speculative_decoding", "continuous_batching"),
        says="static batching is a baseline without speculation",
        holds=lambda c: c.static_batching is None or c.speculative_decoding is None,
        reason=lambda c: (
            "static batching is a baseline without speculation, and speculative decoding "
            f"({c.speculative_decoding.method}) is asked for"
        ),
        repairs=lambda c: (_CONTINUOUS, ("speculative_decoding", None)),
    ),
    Rule(
        name="static cannot adapt",
        kind="needs",
        techniques=("dynamic_batching", "continuous_batching"),
        says="a goal between tokens needs continuous batching: a static batch cannot adapt",
        holds=lambda c: c.static_batching is None or _goal(c) is None,
        reason=lambda c: (
            f"a goal of {_goal(c):g} ms between tokens needs continuous batching, a static batch cannot adapt"
        ),
        repairs=lambda c: (_without_goal(c), _CONTINUOUS),
    ),
    Rule(
        name="a step advances all",
        kind="needs",
        techniques=(),
        says="a step holds a token of every sequence",
        holds=lambda c: c.max_num_batched_tokens >= c.max_num_seqs,
        reason=lambda c: (
            f"max_num_batched_tokens {c.max_num_batched_tokens} is below max_num_seqs "
            f"{c.max_num_seqs}: a step could not advance every sequence"
        ),
        repairs=lambda c: (
            ("max_num_batched_tokens", c.max_num_seqs),
            ("max_num_seqs", c.max_num_batched_tokens),
        ),
    ),
    Rule(
        name="zeros of dummies",
        kind="needs",
        techniques=("pruning",),
        says="--dummy-sparsity makes zeros of dummy weights (--load-format dummy)",
        holds=lambda c: c.dummy_sparsity is None or c.load_format == "dummy",
        reason=lambda c: (
            f"dummy_sparsity {c.dummy_sparsity} makes zeros of dummy weights, and load_format is "
            f"{c.load_format}"
        ),
        repairs=lambda c: (("load_format", "dummy"), ("dummy_sparsity", None)),
    ),
    Rule(
        name="one model beside the CPU backend",
        kind="needs",
        techniques=("speculative_decoding",),
        says="draft models run on the CPU backend and on the cuda backend, heads on the CPU backend; on the "
        "reference backend ngram does",
        holds=lambda c: (
            not _not_cpu(c)
            or c.speculative_decoding is None
            or c.speculative_decoding.method == "ngram"
            or (c.backend == "cuda" and c.speculative_decoding.method == "draft_model")
        ),
        reason=lambda c: (
            f"the {c.backend} backend runs one model, and {c.speculative_decoding.method} is a second"
            if _reference(c)
            else "the cuda backend takes no hidden states out of a model, which a head is fed"
        ),
        repairs=lambda c: (_CPU, ("speculative_decoding", _ngram(c)), ("speculative_decoding", None)),
    ),
    Rule(
        name="the reference swaps nothing",
        kind="needs",
        techniques=("paged_attention",),
        says="pages are swapped by the CPU and the cuda backend, not by the reference",
        holds=lambda c: not (_reference(c) and _swaps(c)),
        reason=lambda c: "the reference backend swaps no pages",
        repairs=lambda c: (
            _CPU,
            ("paged_attention", replace(c.paged_attention, swap_bytes=None, swap_directory=None)),
        ),
    ),
    Rule(
        name="a GPU's pages go to host memory",
        kind="needs",
        techniques=("paged_attention",),
        says="--swap-directory is for the CPU backend's file; a GPU's pages are swapped to host memory",
        holds=lambda c: (
            c.backend != "cuda" or c.paged_attention is None or c.paged_attention.swap_directory is None
        ),
        reason=lambda c: "the cuda backend swaps pages to host memory, and a directory is named for a file",
        repairs=lambda c: (
            ("paged_attention", replace(c.paged_attention, swap_directory=None)),
            _CPU,
        ),
    ),
    Rule(
        name="the CPU backend has instruction sets",
        kind="needs",
        techniques=("hardware_kernels",),
        says="--isa chooses native kernels of the CPU backend; the others run torch and Triton",
        holds=lambda c: not _not_cpu(c) or c.hardware_kernels is None or c.hardware_kernels.isa is None,
        reason=lambda c: (
            f"instruction set {c.hardware_kernels.isa} chooses native kernels, and the {c.backend} "
            f"backend runs {'torch' if _reference(c) else 'the GPU'}"
        ),
        repairs=lambda c: (_CPU, ("hardware_kernels", replace(c.hardware_kernels, isa=None))),
    ),
    Rule(
        name="threads are of processors",
        kind="needs",
        techniques=("parallel_computing",),
        says="--threads counts processors' threads, of which the cuda backend takes none",
        holds=lambda c: (
            c.backend != "cuda" or c.parallel_computing is None or c.parallel_computing.threads is None
        ),
        reason=lambda c: (
            f"{c.parallel_computing.threads} threads are asked for, and the cuda backend computes on a GPU"
        ),
        repairs=lambda c: (_CPU, ("parallel_computing", replace(c.parallel_computing, threads=None))),
    ),
    Rule(
        name="fp8 weights are for GPUs",
        kind="needs",
        techniques=("quantization",),
        says="fp8 is multiplied by GPUs; on the CPU int8 is nearest to it",
        holds=lambda c: c.backend != "cpu" or c.quantization is None or c.quantization.format != "fp8",
        reason=lambda c: "the CPU backend has no kernels for weights in fp8 (GPUs have: --device cuda)",
        repairs=lambda c: (("quantization", Quantization(format="int8")),),
    ),
    Rule(
        name="fp8 keys and values are for GPUs",
        kind="needs",
        techniques=("quantization",),
        says="keys and values in fp8 are read by GPUs; on the CPU int8 is nearest to it",
        holds=lambda c: c.backend != "cpu" or c.kv_dtype != "fp8",
        reason=lambda c: (
            "the CPU backend has no kernels for keys and values in fp8 (GPUs have: --device cuda)"
        ),
        repairs=lambda c: (("kv_dtype", "int8"),),
    ),
    Rule(
        name="weights are offloaded from a GPU",
        kind="needs",
        techniques=("offloading",),
        says="weights are streamed from host memory to a GPU (--device cuda); on the other backends they are "
        "there already, and fewer bits (-q int4) are what takes less of it",
        holds=lambda c: c.offloading is None or c.backend == "cuda",
        reason=lambda c: (
            "offloading keeps weights in host memory for a GPU, and those of the "
            f"{c.backend} backend lie there already (-q int4 makes them smaller)"
        ),
        repairs=lambda c: (("offloading", None), ("backend", "cuda")),
    ),
    Rule(
        name="the reference has no arena",
        kind="needs",
        techniques=("memory_reuse",),
        says="the reference backend has no arena, so memory reuse cannot be turned off there",
        holds=lambda c: not _reference(c) or c.memory_reuse is not None,
        reason=lambda c: "the reference backend has no arena, hence no memory reuse to turn off",
        repairs=lambda c: (_CPU, ("memory_reuse", MemoryReuse())),
    ),
    Rule(
        name="FlashAttention goes off on the CPU",
        kind="needs",
        techniques=("flash_attention",),
        says="the reference backend writes scores out as it is, and the cuda backend has kernels of "
        "FlashAttention alone, so that it can be turned off on neither",
        holds=lambda c: not _not_cpu(c) or c.flash_attention is not None,
        reason=lambda c: (
            "the reference backend has no FlashAttention to turn off"
            if _reference(c)
            else "the cuda backend has no other attention than FlashAttention"
        ),
        repairs=lambda c: (_CPU, ("flash_attention", FlashAttention())),
    ),
    Rule(
        name="the CPU backend pads",
        kind="needs",
        techniques=("dynamic_shapes",),
        says="the other backends pad no steps, so dynamic shapes cannot be turned off there",
        holds=lambda c: not _not_cpu(c) or c.dynamic_shapes is not None,
        reason=lambda c: f"the {c.backend} backend pads no steps, and dynamic shapes are turned off",
        repairs=lambda c: (_CPU, ("dynamic_shapes", DynamicShapes())),
    ),
)
