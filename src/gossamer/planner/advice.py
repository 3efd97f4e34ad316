"""What stands beside a choice: the handbook's own pick, the part of each technique, what else there is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from gossamer.config import EngineConfig, MixedPrecision
from gossamer.config.conflicts import adapt
from gossamer.errors import GossamerError
from gossamer.graph.weights import stored_format
from gossamer.passes.weight_formats import matrices
from gossamer.planner.drafts import known_methods
from gossamer.planner.memory import MemoryPlan
from gossamer.planner.model import PlannedModel
from gossamer.planner.objectives import Goal, Objective
from gossamer.planner.quality import UNKNOWN
from gossamer.planner.search import Candidate, Evaluator
from gossamer.planner.space import KEEPING_KV, Choice, Space, config_of, loss_of, speculative_json
from gossamer.planner.units import ms, size

__all__ = [
    "LINKS", "Handbook", "Offload", "Part", "Suggestion", "handbook", "offload", "offload_sentence", "parts",
    "suggestions",
]  # fmt: skip

LINKS = (("a link of 25 GB/s (PCIe 4.0 x16)", 25.0), ("a disk of 3 GB/s (NVMe)", 3.0))
"""Over which offloaded weights would come; figures of their makers, not of this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handbook:
    """The handbook's pick for an objective. says: in its words; here: what that is in this engine; missing:
    what of it is not built. candidate: None where it is no configuration of this model."""

    says: str
    here: str
    missing: str
    candidate: Candidate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A technique that is on, and what going without it would take and do (None: no prediction, and why in
    the reason). Bytes of the whole process; times in milliseconds."""

    technique: str
    reason: str
    bytes_without: int | None = None
    ttft_ms_without: float | None = None
    itl_ms_without: float | None = None
    tokens_per_s_without: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """Something that is never chosen, since it changes the model, needs measuring or is not built. command:
    to type; "" where there is none."""

    what: str
    effect: str
    command: str = ""
    built: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """Weights that would stay elsewhere (not built for CPUs). resident, streamed: bytes here in all, and of
    weights that come anew in every step; seconds: (link, least seconds of a step) over each of LINKS."""

    resident: int
    streamed: int
    seconds: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pick:
    says: str
    here: str
    missing: str
    weights: str
    seqs: int | None = None  # the goal's concurrency
    tokens: int = 512


_FAST = "weights as stored; FlashAttention, continuous batching and this processor's kernels are always on"
_PICKS: dict[Objective, _Pick] = {
    "memory": _Pick(
        says="4-bit/INT8 quantization, PagedAttention, offloading",
        here="int4 weights, paged KV in bf16",
        missing="offloading",
        weights="int4",
    ),
    "latency": _Pick(
        says="FlashAttention, continuous batching, TensorRT",
        here=_FAST,
        missing="TensorRT",
        weights="as stored",
    ),
    "throughput": _Pick(
        says="FlashAttention, continuous batching, TensorRT",
        here=_FAST,
        missing="TensorRT",
        weights="as stored",
    ),
    "easy": _Pick(
        says="TGI or vLLM out of the box",
        here="the engine's defaults: weights as stored, 32 sequences, steps of 512 tokens",
        missing="",
        weights="as stored",
        seqs=32,
    ),
    "production": _Pick(
        says="TGI or vLLM for high concurrency",
        here="weights as stored, room for all requests at once, steps of 2048 tokens as in vLLM",
        missing="",
        weights="as stored",
        tokens=2048,
    ),
    "production-latency": _Pick(
        says="TensorRT for low latency",
        here="int8 weights, as TensorRT would have them",
        missing="TensorRT",
        weights="int8",
    ),
}  # fmt: skip


def handbook(evaluator: Evaluator, space: Space, goal: Goal) -> Handbook:
    """Its last section, mapped to what exists here, with the prediction of it."""
    pick = _PICKS[goal.objective]
    like = max(space.choices, key=lambda c: (c.seqs, c.tokens))
    options = {c.weights.name: c.weights for c in space.choices}
    weights = next((w for name, w in options.items() if name.startswith(pick.weights)), space.stored)
    seqs = pick.seqs or goal.work.concurrency
    choice = replace(
        like,
        weights=weights,
        kv="bf16",
        seqs=seqs,
        tokens=max(pick.tokens, seqs),
        kv_tokens=max(like.context, min(seqs, goal.work.concurrency) * -(-goal.work.longest // 16) * 16),
        speculation=None,
    )
    candidate = None
    try:
        config = config_of(space.base, evaluator.model.graph, choice)
        candidate = evaluator.candidate(choice, config, loss_of(evaluator.model, choice, space.stored))
    except GossamerError:
        pass  # its pick stands there without a prediction
    return Handbook(says=pick.says, here=pick.here, missing=pick.missing, candidate=candidate)


def parts(evaluator: Evaluator, space: Space, chosen: Candidate) -> list[Part]:
    """What each technique that is on contributes: the chosen configuration with and without it."""
    config, choice, graph = chosen.config, chosen.choice, evaluator.model.graph
    trials: list[tuple[str, EngineConfig, str]] = []

    def trial(name: str, reason: str, without: EngineConfig) -> None:
        trials.append((name, without, reason))

    if config.quantization is not None or config.weight_formats:
        stored = replace(choice, weights=space.stored)
        reason = f"weights in {choice.weights.name} instead of {_unquantized(space)}"
        trial("quantization", reason, config_of(_unset(space.base), graph, stored))
    elif config.mixed_precision is not None:
        reason = f"weights in {config.mixed_precision.dtype} instead of f32"
        trial("mixed_precision", reason, replace(config, mixed_precision=None))
    if choice.kv not in KEEPING_KV:
        wide = config_of(space.base, graph, replace(choice, kv="bf16"))
        trial("kv_quantization", f"keys and values in {choice.kv} instead of bf16", wide)
    if space.base.paged_attention is not None:
        contiguous = adapt(space.base, paged_attention=None)
        reason = f"pages on demand instead of {choice.seqs} x {choice.context} tokens reserved"
        trial("paged_attention", reason, config_of(contiguous, graph, choice))
    for name, reason in (
        ("memory_reuse", "one arena instead of a buffer for each intermediate"),
        ("operator_fusion", "fewer passes over the activations"),
        ("layer_fusion", "a tile of tokens stays in the cache through a whole block"),
        ("flash_attention", "scores stay in a tile instead of memory"),
        ("dynamic_shapes", "steps as large as their tokens instead of padded"),
        ("parallel_computing", "all processors instead of one"),
        ("speculative_decoding", "several tokens from one reading of the weights"),
    ):
        if getattr(config, name) is not None:
            trial(name, reason, adapt(config, **{name: None}))
    return [_part(evaluator, choice, *each) for each in trials]


_UNTIMED = {"flash_attention", "dynamic_shapes"}  # the time model is of kernels that nobody would go without


def _unset(base: EngineConfig) -> EngineConfig:
    """The base without the quantization that the user's flags may have said."""
    half = base.mixed_precision if base.quantization is None else MixedPrecision()
    return replace(base, quantization=None, weight_formats=(), mixed_precision=half)


def _unquantized(space: Space) -> str:
    return "bf16" if space.base.quantization is not None else space.stored.name


def _part(evaluator: Evaluator, choice: Choice, name: str, without: EngineConfig, reason: str) -> Part:
    try:
        other = evaluator.candidate(choice, without, UNKNOWN)
    except GossamerError as error:
        return Part(technique=name, reason=f"{reason} (without it: {str(error).partition(';')[0][:120]})")
    if name in _UNTIMED:
        return Part(technique=name, reason=reason, bytes_without=other.bytes)
    return Part(
        technique=name,
        reason=reason,
        bytes_without=other.bytes,
        ttft_ms_without=other.times.ttft_ms,
        itl_ms_without=other.times.itl_ms,
        tokens_per_s_without=other.times.tokens_per_s,
    )


def offload(memory: MemoryPlan, budget: int) -> Offload | None:
    """What keeping a part of the weights elsewhere would take: all else stays, and what does not fit beside
    it is read once in every step. None where everything fits, or not even the rest does."""
    rest = memory.total - memory.engine.weights
    streamed = memory.total - budget
    if streamed <= 0 or rest >= budget:
        return None
    return Offload(
        resident=budget,
        streamed=streamed,
        seconds=tuple((link, streamed / (speed * 1e9)) for link, speed in LINKS),
    )


def offload_sentence(found: Offload | None) -> str:
    """The same, as the end of a refusal."""
    if found is None:
        return ""
    times = " or ".join(f"{ms(1e3 * seconds)} over {link}" for link, seconds in found.seconds)
    return (
        f"; offloading (built for GPUs alone) would keep {size(found.resident)} here and read "
        f"{size(found.streamed)} of weights in every step, which takes at least {times}"
    )


def suggestions(evaluator: Evaluator, space: Space, chosen: Candidate, budget: int) -> list[Suggestion]:
    """What else there is: recipes that change the model, guesses of tokens, and what is not built."""
    model = evaluator.model
    found = [
        *_recipes(model, chosen),
        *_speculation(model, chosen),
        *_not_built(evaluator, space, chosen, budget),
    ]
    return [replace(each, command=each.command.replace("MODEL", model.name)) for each in found]


def _recipes(model: PlannedModel, chosen: Candidate) -> list[Suggestion]:
    """What `gossamer compress` would make of a model in floats."""
    held = matrices(model.graph)
    if any(stored_format(w.expr)[0] != "f32" for w in held.values()):
        return []
    every = sum(prod(w.shape) for w in held.values())
    inside = {name for node in model.graph.nodes if node.scope for name in node.weights}
    blocks = sum(prod(w.shape) for name, w in held.items() if name in inside)
    command = "gossamer compress MODEL --recipe {} --text FILE -o DIR"
    found = []
    if not chosen.choice.weights.keeps:
        found.append(
            Suggestion(
                what="quantize ahead of serving, by GPTQ, rather than at load",
                effect=f"weights of about {size(every * 4.25 / 8)} that lose less than int4 made at load, "
                "and a certificate of how much",
                command=command.format("int4-gptq"),
            )
        )
        found.append(
            Suggestion(
                what="mixed bits, a format for each matrix by its measured sensitivity",
                effect=f"weights of about {size(every * 4.5 / 8)}; made by RTN rather than GPTQ, its "
                "sensitivities feed this plan (--sensitivity)",
                command=command.format("mixed-4.5"),
            )
        )
    found.append(
        Suggestion(
            what="pruning, 2 of 4 weights zero, then int8",
            effect=f"weights of about {size(blocks * 5 / 8 + every - blocks)} (a bit for each number, and a "
            "byte for those left) after recovery training",
            command=command.format("sparse-2of4-int8"),
        )
    )
    found.append(
        Suggestion(
            what="pruning of a quarter of the MLP channels and distillation",
            effect="about a quarter less to read and to multiply in each block, after training; the student "
            "drafts for its teacher, too",
            command=command.format("smaller"),
        )
    )
    return found


def _speculation(model: PlannedModel, chosen: Candidate) -> list[Suggestion]:
    """Guesses leave outputs as they are; what they gain depends on the text, so it is measured first."""
    if chosen.config.speculative_decoding is not None or chosen.config.static_batching is not None:
        return []
    return [
        Suggestion(
            what=f"speculative decoding, {method}",
            effect=f"the same tokens, perhaps sooner: {_WHY[method]}; once it is known how many guesses "
            f"stand, --acceptance {method}=RATE makes it a part of the plan",
            command=f"gossamer bench speculation MODEL --speculative-config '{speculative_json(guesses)}'",
        )
        for method, guesses in known_methods(model).items()
    ]


_WHY = {
    "ngram": "where the output quotes its prompt",
    "draft_model": "its smaller student guesses",
    "eagle": "a trained head lies in the model's folder",
}


def _not_built(evaluator: Evaluator, space: Space, chosen: Candidate, budget: int) -> list[Suggestion]:
    found = []
    wide = replace(chosen.choice, weights=space.stored)
    stored = evaluator.candidate(wide, config_of(_unset(space.base), evaluator.model.graph, wide), UNKNOWN)
    moved = offload(stored.memory, budget)
    if moved is not None:
        times = " or ".join(f"{ms(1e3 * seconds)} over {link}" for link, seconds in moved.seconds)
        found.append(
            Suggestion(
                what=f"offloading, to keep weights {_unquantized(space)}",
                effect=f"{size(moved.resident)} here and {size(moved.streamed)} read in every step: at least "
                f"{times}",
                built=False,
            )
        )
    memory = chosen.memory
    half = (memory.engine.weights + memory.engine.kv) // 2
    found.append(
        Suggestion(
            what="tensor parallelism over 2 processes or machines",
            effect=f"{size(memory.total - half)} for each instead of {size(memory.total)}; at best half of "
            f"{ms(chosen.times.itl_ms)} between tokens, and on top two exchanges of "
            f"{evaluator.model.graph.hidden:,} numbers per token and layer",
            built=False,
        )
    )
    return found
