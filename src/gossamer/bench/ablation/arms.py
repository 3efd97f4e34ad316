"""What is held against what: for every technique and mode two settings of an engine, as plain data.

A setting is fields of EngineConfig over a base; the base of `alone` is the engine as it comes, with bf16
weights, that of `cumulative` and `without` one with every technique off or on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from gossamer.bench.ablation.mix import LONG, SLOW, STACKED, USUAL, Work, pages_needed
from gossamer.bench.ledger import Mode
from gossamer.config import (
    DynamicBatching,
    EngineConfig,
    MixedPrecision,
    Quantization,
    SparseWeights,
    SpeculativeDecoding,
    StaticBatching,
)
from gossamer.techniques import CARDS, card

__all__ = [
    "LIMITS",
    "NAMES",
    "ORDER",
    "Arm",
    "Setting",
    "alone",
    "base",
    "cumulative",
    "further",
    "typed",
    "without",
]

_FIELDS = {f.name: f for f in fields(EngineConfig)}
_SEQUENCES, _LENGTH = 8, 512
_PADDED = 128
_STACKED_TOKENS, _STACKED_SEQUENCES = 64, 4
LIMITS: Mapping[str, Any] = {"max_num_seqs": _SEQUENCES, "max_model_len": _LENGTH, "prefix_cache": None}
"""Of every engine here. Prompts of a round are new, so that a prefix cache would find nothing."""

NAMES = tuple(card.name for card in CARDS)
"""The techniques in the handbook's order."""
ORDER = (
    "dynamic_shapes", "hardware_kernels", "parallel_computing", "flash_attention", "mixed_precision",
    "operator_fusion", "layer_fusion", "memory_reuse", "paged_attention", "continuous_batching",
    "quantization", "speculative_decoding",
)  # fmt: skip
"""The order in which techniques are added: what changes no output first, the cheapest to have before the
others; then how requests share the machine; then what costs quality or may lose."""

_PRUNED_NOTE = (
    "random weights with such zeros: what pruning costs in quality follows from the model, and "
    "`gossamer compress MODEL --recipe sparse-2of4-int8` measures it",
    "pruned by SparseGPT and not trained after it",
)
_SLOW = ("hardware_kernels", "dynamic_shapes")  # whose baselines take many times as long
_NUMBERS = ("quantization", "mixed_precision")  # which change what the model computes


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """fields: of EngineConfig, over the base. kv_tokens: what the KV pool has room for (None: whatever the
    engine takes); roomy_tokens: the same where memory is measured. limits: more fields where speed is
    measured. model: another one than the ledger's."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    kv_tokens: int | None = None
    roomy_tokens: int | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Two settings to hold against each other. note: why they cannot be (then there are none), or what their
    figures do not show. quality: whether the technique changes numbers. own: speed is of the model itself,
    whatever shape was asked for; shaped: only a shape with random weights can be measured."""

    technique: str
    mode: Mode
    off: Setting | None = None
    on: Setting | None = None
    work: Work = USUAL
    note: str = ""
    quality: bool = False
    own: bool = False
    shaped: bool = False


def base(model: str, **given: Any) -> EngineConfig:
    """The engine as it comes, with weights in bf16."""
    return EngineConfig(model=model, **{"mixed_precision": MixedPrecision(), **LIMITS, **given})


def _on(name: str) -> dict[str, Any]:
    """The fields with which a technique is on."""
    special: dict[str, dict[str, Any]] = {
        "quantization": {"quantization": Quantization(format="int4"), "mixed_precision": None},
        "mixed_precision": {"mixed_precision": MixedPrecision(), "quantization": None},
        "speculative_decoding": {"speculative_decoding": SpeculativeDecoding(method="ngram")},
    }
    if name in special:
        return special[name]
    made = _FIELDS[name].default_factory
    assert made is not MISSING, f"{name} is off in the engine as it comes"
    return {name: made()} | ({"static_batching": None} if name == "continuous_batching" else {})


def _off(name: str) -> dict[str, Any]:
    """The fields with which it is off."""
    if name == "continuous_batching":
        return {name: None, "static_batching": StaticBatching()}
    if name == "quantization":
        return {name: None, "mixed_precision": MixedPrecision()}
    return {name: None}


def alone(
    names: Sequence[str],
    *,
    goal_ms: float = 50.0,
    gap_ms: float = 0.0,
    student: str | None = None,
    pruned: str | None = None,
) -> list[Arm]:
    """Each technique against its honest baseline. goal_ms, gap_ms: between tokens and, on average, between
    requests, for dynamic batching; student, pruned: models made of the ledger's, if there are. Raises
    ConfigError for names that are none."""
    return [_alone(card(name).name, goal_ms, gap_ms, student, pruned) for name in names]


def _alone(name: str, goal_ms: float, gap_ms: float, student: str | None, pruned: str | None) -> Arm:
    built = card(name)
    if not built.built:
        return Arm(technique=name, mode="alone", note=f"not built: {built.missing}")
    if name == "offloading":
        note = (
            "not measured: it is of a GPU's memory, and engines here are the CPU's; `gossamer bench latency "
            "MODEL --device cuda`, with and without --offload SIZE, measures it"
        )
        return Arm(technique=name, mode="alone", note=note)
    if name == "pruning":
        return _pruning(pruned)
    if name == "distillation":
        return _distillation(student)
    if name == "paged_attention":
        return _paged()
    if name == "dynamic_batching":
        goal = {"dynamic_batching": DynamicBatching(itl_goal_ms=goal_ms)}
        return Arm(
            technique=name,
            mode="alone",
            off=Setting(name="fixed limits"),
            on=Setting(name=f"a goal of {goal_ms:g} ms", fields=goal),
            work=replace(USUAL, latency="mix", gap_ms=gap_ms),
            note="requests come one by one, as fast as they are served; time between tokens is the 95th "
            "percentile over the mix, to first token its mean",
        )
    off, on = Setting(name=f"without {_words(name)}", fields=_off(name)), _words(name)
    work, note = SLOW if name in _SLOW else USUAL, ""
    fields: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    if name == "quantization":
        off, on, fields = Setting(name="bf16"), "int4", _on(name)
    elif name == "mixed_precision":
        off, on = Setting(name="fp32", fields=_off(name)), "bf16"
    elif name == "dynamic_shapes":
        limits = {"max_num_batched_tokens": _PADDED}
        off = Setting(name=f"padded to {_PADDED} tokens a step", fields=_off(name), limits=limits)
        note = "steps of more tokens would be padded further, and the baseline be slower still"
    elif name == "flash_attention":
        off, work = Setting(name="materialised scores", fields=_off(name)), LONG
    elif name == "operator_fusion":  # the baseline of one is the graph without the other
        fields = {"layer_fusion": None}
        off = Setting(name="unfused graph", fields=_off(name) | fields)
    elif name == "layer_fusion":
        off = Setting(name="operator-fused graph", fields=_off(name))
    elif name == "continuous_batching":
        off = Setting(name="static batching", fields=_off(name))
        work = replace(USUAL, latency="mix")
        note = "times are of the mix: the mean to first token, the 95th percentile between tokens"
    elif name == "speculative_decoding":
        off, on, fields = Setting(name="plain decoding"), "n-gram lookup", _on(name)
        work = replace(USUAL, lone=(96, 64), times=1, quotes=True)
        note = (
            "time between tokens is of an answer that quotes its prompt; the mix's random tokens have "
            "nothing to guess"
        )
    return Arm(
        technique=name,
        mode="alone",
        off=off,
        on=Setting(name=on, fields=fields, limits=limits),
        work=work,
        note=note,
        quality=name in _NUMBERS,
    )


def _paged() -> Arm:
    """Speed in the memory of two slots; memory with what the same requests need at once."""
    memory = 2 * _LENGTH
    return Arm(
        technique="paged_attention",
        mode="alone",
        off=Setting(
            name="contiguous slots",
            fields={"paged_attention": None},
            kv_tokens=memory,
            roomy_tokens=_SEQUENCES * _LENGTH,
        ),
        on=Setting(name="pages", kv_tokens=memory, roomy_tokens=_needed(USUAL)),
        work=replace(USUAL, latency="mix"),
        note=f"speed: both have KV memory for {memory} tokens, and times are of the mix; memory: what the "
        f"same {_SEQUENCES} requests take at once",
    )


def _needed(work: Work, sequences: int = _SEQUENCES) -> int:
    """Tokens of KV memory in which no request that runs waits for another, and the longest one fits."""
    return max(_LENGTH, 16 * pages_needed(work, sequences))


def _pruning(pruned: str | None) -> Arm:
    return Arm(
        technique="pruning",
        mode="alone",
        off=Setting(name="dense"),
        on=_zeros("two of four weights zero", pruned, {}),
        quality=pruned is not None,
        shaped=pruned is None,
        note=_PRUNED_NOTE[pruned is not None],
    )


def _zeros(name: str, pruned: str | None, fields: Mapping[str, Any]) -> Setting:
    """Zeros left out of memory: of the pruned model, or else of random weights that are given some, on a
    shape."""
    sparse = {"sparse_weights": SparseWeights(count=True)}
    if pruned is not None:
        return Setting(name=name, fields={**fields, **sparse}, model=pruned)
    return Setting(name=name, fields=fields, limits={"dummy_sparsity": "2:4", **sparse})


def _distillation(student: str | None) -> Arm:
    if student is None:
        return Arm(
            technique="distillation",
            mode="alone",
            note="not measured: no student of this model is here; `gossamer compress MODEL --recipe half` "
            "makes one (hours), --full a hasty one",
        )
    return Arm(
        technique="distillation",
        mode="alone",
        off=Setting(name="teacher"),
        on=Setting(name="student", model=student),
        quality=True,
        own=True,
    )


def further(names: Sequence[str], *, student: str | None = None, pruned: str | None = None) -> list[Arm]:
    """Second comparisons, where one baseline does not answer what people ask: whether zeros are worth having
    beside fewer bits, and guesses of a smaller model beside those looked up."""
    arms = []
    if "pruning" in names:
        note = "against the better known way to as few bytes; " + _PRUNED_NOTE[pruned is not None]
        arms.append(
            Arm(
                technique="pruning",
                mode="alone",
                off=Setting(name="dense int4", fields=_on("quantization")),
                on=_zeros(
                    "int8, two of four weights zero",
                    pruned,
                    {"quantization": Quantization(format="int8"), "mixed_precision": None},
                ),
                quality=pruned is not None,
                shaped=pruned is None,
                note=note,
            )
        )
    if "speculative_decoding" in names and student is not None:
        arms.append(
            Arm(
                technique="speculative_decoding",
                mode="alone",
                off=Setting(name="plain decoding"),
                on=Setting(
                    name="drafts of the student",
                    fields={"speculative_decoding": SpeculativeDecoding(method="draft_model", model=student)},
                ),
                work=replace(USUAL, lone=(96, 32)),
                own=True,
                note="prompts are random tokens; no more is drafted where it does not pay",
            )
        )
    return arms


def cumulative(names: Sequence[str]) -> list[Arm]:
    """Techniques added one to the other in ORDER, from an engine with all of them off. Techniques that are
    not in `names` stay off."""
    current = {key: value for name in ORDER for key, value in _off(name).items()} | {
        "mixed_precision": None,
        "max_num_seqs": _STACKED_SEQUENCES,
    }
    limits = {"max_num_batched_tokens": _STACKED_TOKENS}
    arms, before, tokens = [], Setting(name="everything off", fields=current, limits=limits), None
    for name in (n for n in ORDER if n in names):
        current = current | _on(name)
        tokens = _needed(STACKED, _STACKED_SEQUENCES) if name == "paged_attention" else tokens
        after = Setting(name=f"+ {_words(name)}", fields=current, kv_tokens=tokens, limits=limits)
        arms.append(_arm(name, "cumulative", before, after))
        before = after
    return arms


def without(names: Sequence[str]) -> list[Arm]:
    """Each technique left out of all of ORDER together."""
    whole: dict[str, Any] = {"max_num_seqs": _STACKED_SEQUENCES}
    for name in ORDER:
        whole |= _on(name)
    tokens = _needed(STACKED, _STACKED_SEQUENCES)
    limits = {"max_num_batched_tokens": _STACKED_TOKENS}
    on = Setting(name="everything on", fields=whole, kv_tokens=tokens, limits=limits)
    arms = []
    for name in (n for n in ORDER if n in names):
        if name == "mixed_precision":
            note = "with quantization on, no matrix is left for it"
            arms.append(Arm(technique=name, mode="without", note=note))
            continue
        both = {"speculative_decoding": None} if name == "continuous_batching" else {}  # static has none
        room = None if name == "paged_attention" else tokens
        off = replace(on, name=f"- {_words(name)}", fields=whole | _off(name) | both, kv_tokens=room)
        arms.append(_arm(name, "without", off, replace(on, fields=whole | both)))
    return arms


def _arm(name: str, mode: Mode, off: Setting, on: Setting) -> Arm:
    work = replace(STACKED, quotes=name == "speculative_decoding")
    return Arm(technique=name, mode=mode, off=off, on=on, work=work, quality=name in _NUMBERS)


def _words(name: str) -> str:
    return name.replace("_", " ")


_FLAGS = {
    "operator_fusion": "--no-operator-fusion",
    "layer_fusion": "--no-layer-fusion",
    "dynamic_shapes": "--no-dynamic-shapes",
    "flash_attention": "--no-flash-attention",
    "paged_attention": "--no-paged-attention",
    "memory_reuse": "--no-memory-reuse",
    "hardware_kernels": "--isa scalar --no-autotune",
    "parallel_computing": "--threads 1",
}


def typed(config: EngineConfig) -> str:
    """The configuration as flags, less the model."""
    given = [f"-q {config.quantization}"] if config.quantization is not None else []
    if config.quantization is None:
        half = config.mixed_precision
        given.append(f"--dtype {'float32' if half is None else _TYPES[half.dtype]}")
    given += [flag for name, flag in _FLAGS.items() if getattr(config, name) is None]
    if config.static_batching is not None:
        given.append("--static-batching " + ("padded" if config.static_batching.padded else "ragged"))
    if config.dynamic_batching is not None:
        given.append(f"--itl-goal-ms {config.dynamic_batching.itl_goal_ms:g}")
    if config.speculative_decoding is not None:
        own = config.speculative_decoding
        model = f', "model": "{own.model}"' if own.model else ""
        given.append(f"""--speculative-config '{{"method": "{own.method}"{model}}}'""")
    if config.dummy_sparsity is not None:
        given.append(f"--load-format dummy --dummy-sparsity {config.dummy_sparsity} --sparse-weights")
    given += [
        f"--max-num-seqs {config.max_num_seqs}",
        f"--max-num-batched-tokens {config.max_num_batched_tokens}",
    ]
    given += [f"--max-model-len {config.max_model_len}"] if config.max_model_len else []
    given += [f"--kv-bytes {config.kv_bytes}"] if config.kv_bytes else []
    if config.prefix_cache is None:
        given.append("--no-enable-prefix-caching")
    return " ".join(given)


_TYPES = {"bf16": "bfloat16", "f16": "float16"}
