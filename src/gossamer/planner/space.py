"""What a plan may choose among: formats of weights and of KV, how much runs at once, guesses of tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from gossamer.backends.cpu.formats import kv_page_bytes
from gossamer.config import EngineConfig, Quantization, SpeculativeDecoding
from gossamer.config.engine import KVType
from gossamer.config.weight_formats import WeightFormats, parse_stored
from gossamer.graph.ir import Graph
from gossamer.graph.weights import stored_format
from gossamer.passes.weight_formats import largest_group, matrices
from gossamer.planner.drafts import speculations
from gossamer.planner.model import PlannedModel
from gossamer.planner.objectives import Goal
from gossamer.planner.quality import UNKNOWN, Loss, SensitivityFile, certified

__all__ = [
    "DECIDED",
    "KEEPING_KV",
    "Choice",
    "Space",
    "WeightOption",
    "config_of",
    "space_of",
    "speculative_json",
    "stored_weights",
]  # fmt: skip

DECIDED = ("weights", "kv", "seqs", "tokens", "context", "kv_bytes", "speculation")
"""What a plan decides; a user who says one of them has decided it."""
KEEPING_KV: tuple[KVType, ...] = ("bf16", "f16", "f32")
"""Types of keys and values that are not counted as a change of the model."""
_SPELLED_KV = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_FULL_WEIGHTS = ("int8", "int4-g128", "int4-g64", "int4-g32", "uint4", "nf4")
_MIXED = 4  # mixed choices of a sensitivity file that are tried
_PAGE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOption:
    """A way to store weights. keeps: whether no number of the checkpoint changes; bits: of a weight, roughly;
    given: whether the user's own flags say it. loss: with KV of KEEPING_KV, as far as it is known."""

    name: str
    keeps: bool
    bits: float
    given: bool = False
    quantization: Quantization | None = None
    dtype: str | None = None
    formats: WeightFormats = ()
    loss: Loss = UNKNOWN

    @property
    def flags(self) -> tuple[tuple[str, str], ...]:
        """As typed."""
        if self.formats:
            return tuple(("weight-format", f"{name}={stored}") for name, stored in self.formats)
        if self.quantization is not None:
            return (("quantization", str(self.quantization)),)
        return () if self.dtype is None else (("dtype", self.dtype),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One point. context: the longest sequence, kv_tokens: that the KV pool holds, a multiple of 16."""

    weights: WeightOption
    kv: KVType
    seqs: int
    tokens: int
    context: int
    kv_tokens: int
    speculation: SpeculativeDecoding | None = None

    @property
    def keeps(self) -> bool:
        """Whether the model's numbers stay what the checkpoint says."""
        return self.weights.keeps and self.kv in KEEPING_KV

    @property
    def name(self) -> str:
        """In a few words."""
        guesses = "" if self.speculation is None else f", {self.speculation.method}"
        return f"{self.weights.name}, {self.kv} KV, {self.seqs} x {self.tokens}{guesses}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """All that is tried. choices: every one of them meets the goal's concurrency and context."""

    base: EngineConfig
    choices: tuple[Choice, ...]
    stored: WeightOption
    given: frozenset[str]


def config_of(base: EngineConfig, graph: Graph, choice: Choice) -> EngineConfig:
    """The configuration of a choice: the base, which holds what the user said, with it.

    Raises ConfigError for a combination that cannot be.
    """
    weights = choice.weights
    config = base
    if not weights.given and weights.formats:  # what they do not name stays as it is
        config = replace(base, quantization=None, weight_formats=weights.formats)
    elif not weights.given and weights.quantization is not None:
        config = replace(base, mixed_precision=None, quantization=weights.quantization, weight_formats=())
    elif not weights.given and weights.dtype is not None:
        dtype = parse_stored(weights.dtype)
        assert not isinstance(dtype, Quantization)
        config = replace(base, mixed_precision=dtype, quantization=None, weight_formats=())
    return replace(
        config,
        kv_dtype=choice.kv,
        max_num_seqs=choice.seqs,
        max_num_batched_tokens=choice.tokens,
        max_model_len=choice.context,
        kv_bytes=pool_bytes(base, graph, choice),
        speculative_decoding=choice.speculation,
    )


def pool_bytes(base: EngineConfig, graph: Graph, choice: Choice) -> int:
    """Size of the KV pool."""
    if base.paged_attention is None:  # every place holds the longest sequence
        slot = _ceil(choice.context, _PAGE)
        return choice.seqs * slot // _PAGE * kv_page_bytes(graph, _PAGE, choice.kv)
    page = base.paged_attention.page_size
    return _ceil(choice.kv_tokens, page) // page * kv_page_bytes(graph, page, choice.kv)


def flags_of(base: EngineConfig, graph: Graph, choice: Choice) -> tuple[tuple[str, str], ...]:
    """(long flag without its dashes, value) pairs that say the choice; a flag may come more than once."""
    flags = list(() if choice.weights.given else choice.weights.flags)
    flags += [
        ("kv-cache-dtype", _SPELLED_KV.get(choice.kv, choice.kv)),
        ("max-model-len", str(choice.context)),
        ("kv-bytes", str(pool_bytes(base, graph, choice))),
        ("max-num-seqs", str(choice.seqs)),
        ("max-num-batched-tokens", str(choice.tokens)),
    ]
    if choice.speculation is not None:
        flags.append(("speculative-config", speculative_json(choice.speculation)))
    return tuple(flags)


def stored_weights(model: PlannedModel, base: EngineConfig) -> WeightOption:
    """The option that changes nothing: as the checkpoint (and, of floats, its config.json) has them."""
    formats = {stored_format(w.expr)[0] for w in matrices(model.graph).values()}
    integers = sorted(formats - {"f32"})
    name = (
        "+".join(integers)
        if integers
        else ("f32" if base.mixed_precision is None else base.mixed_precision.dtype)
    )
    bits = 4.5 if integers else 32.0 if base.mixed_precision is None else 16.0
    return WeightOption(name=f"as stored ({name})", keeps=True, bits=bits)


def space_of(
    model: PlannedModel,
    base: EngineConfig,
    goal: Goal,
    *,
    given: Collection[str] = (),
    sensitivity: SensitivityFile | None = None,
    acceptance: Mapping[str, float] | None = None,
    full: bool = False,
) -> Space:
    """What is tried for a goal. given: which of DECIDED the user's flags in `base` have decided already;
    acceptance: of guesses, by method, as far as it is known; without it none are tried. full: every format
    and limit there is, not the usual ones alone."""
    stored = stored_weights(model, base)
    weights = _weights(model, base, stored, given, sensitivity, full)
    if "kv" in given:
        kvs: Sequence[KVType] = (base.kv_dtype,)
    else:
        kvs = ("bf16", "int8", "int4") if full or goal.objective == "memory" else ("bf16", "int8")
    seqs = [base.max_num_seqs] if "seqs" in given else _seqs(goal, full)
    tokens = [base.max_num_batched_tokens] if "tokens" in given else _tokens(full)
    guesses_of: Sequence[SpeculativeDecoding | None] = [base.speculative_decoding]
    if "speculation" not in given and acceptance and base.static_batching is None:
        guesses_of = speculations(model, acceptance, (2, 4, 8) if full else (4,))
    choices = []
    for weight, kv, seq, token, guesses in product(weights, kvs, seqs, tokens, guesses_of):
        if token < seq:
            continue
        context = _context(model, base, goal, given)
        room = _room(model, base, goal, given, kv, seq, context)
        choices.append(
            Choice(
                weights=weight, kv=kv, seqs=seq, tokens=token, context=context, speculation=guesses,
                kv_tokens=room,
            )
        )  # fmt: skip
    return Space(base=base, choices=tuple(choices), stored=stored, given=frozenset(given))


def loss_of(model: PlannedModel, choice: Choice, stored: WeightOption) -> Loss:
    """What is known of a choice's quality."""
    if choice.weights == stored or (choice.weights.given and choice.weights.keeps):
        return certified(model.certificate, choice.kv)
    return choice.weights.loss if choice.kv in KEEPING_KV else UNKNOWN


def _weights(
    model: PlannedModel,
    base: EngineConfig,
    stored: WeightOption,
    given: Collection[str],
    sensitivity: SensitivityFile | None,
    full: bool,
) -> list[WeightOption]:
    if "weights" in given:
        said = base.quantization or ("f32" if base.mixed_precision is None else base.mixed_precision.dtype)
        mixed = " with patterns" if base.weight_formats else ""
        keeps = base.quantization is None and not base.weight_formats
        return [WeightOption(name=f"{said}{mixed}", keeps=keeps, bits=_bits(str(said)), given=True)]
    options = [stored]
    held = matrices(model.graph)
    if any(stored_format(w.expr)[0] != "f32" for w in held.values()):
        return options  # rounding integers anew is a recipe's work, not a flag's
    if base.mixed_precision is None:
        options.append(WeightOption(name="bf16", keeps=False, bits=16.0, dtype="bfloat16"))
    elif full:
        options.append(
            WeightOption(name="f32", keeps=base.mixed_precision.dtype == "bf16", bits=32.0, dtype="float32")
        )
    inputs = [w.shape[-1] for w in held.values()]
    names = ["int8", *(f"int4-g{g}" for g in dict.fromkeys((largest_group("int4", inputs), 32)))]
    if full:
        names = list(dict.fromkeys([*names, *_FULL_WEIGHTS]))
    for name in names:
        loss = UNKNOWN if sensitivity is None else sensitivity.uniform(name)
        options.append(
            WeightOption(
                name=name, keeps=False, bits=_bits(name), quantization=Quantization.parse(name), loss=loss
            )
        )
    return options + ([] if sensitivity is None else _mixed(sensitivity))


def _mixed(sensitivity: SensitivityFile) -> list[WeightOption]:
    """Some of the front, evenly. Matrices that the file does not know stay as they are."""
    front = sensitivity.front()
    steps = sorted({round(i * (len(front) - 1) / max(_MIXED - 1, 1)) for i in range(_MIXED)}) if front else []
    options = []
    for chosen, bits, kl in (front[i] for i in steps):
        pairs = tuple(
            (name, stored)
            for unit, stored in zip(sensitivity.matrices, chosen, strict=True)
            for name in unit.names
        )
        options.append(
            WeightOption(
                name=f"mixed, {bits:.2f} bits", keeps=False, bits=bits, formats=pairs,
                loss=Loss(kl=kl, source=sensitivity.source),
            )
        )  # fmt: skip
    return options


def _seqs(goal: Goal, full: bool) -> list[int]:
    """How many sequences may run. No more than come: places that stay empty cost memory."""
    come = goal.work.concurrency
    if goal.fixed_concurrency or goal.objective in ("latency", "memory", "production-latency"):
        return [come]
    if goal.objective == "easy":
        return [n for n in (32, 16, 8, 4, 2, 1) if full or n in (32, 8, 1)]
    usual = (1, 2, 4, 8, 16, 32, 64, 128) if full else (4, 8, 16, 32, 64)
    return sorted({n for n in usual if n <= come} | {come})


def _tokens(full: bool) -> list[int]:
    return [64, 128, 256, 512, 1024, 2048] if full else [128, 512, 1024]


def _context(model: PlannedModel, base: EngineConfig, goal: Goal, given: Collection[str]) -> int:
    if "context" in given and base.max_model_len is not None:
        return base.max_model_len
    return min(_ceil(goal.work.longest, _PAGE), model.graph.reach)


def _room(
    model: PlannedModel,
    base: EngineConfig,
    goal: Goal,
    given: Collection[str],
    kv: KVType,
    seqs: int,
    context: int,
) -> int:
    """Tokens of the KV pool: what was given, else a longest sequence, or the workload's requests together."""
    if "kv_bytes" in given and base.kv_bytes is not None:
        return base.kv_bytes // kv_page_bytes(model.graph, _PAGE, kv) * _PAGE
    return max(_ceil(context, _PAGE), min(seqs, goal.work.concurrency) * _ceil(goal.work.longest, _PAGE))


def _bits(name: str) -> float:
    return {"f32": 32.0, "bf16": 16.0, "f16": 16.0}.get(name, 8.0 if name.startswith("int8") else 4.5)


def speculative_json(speculation: SpeculativeDecoding) -> str:
    """As --speculative-config takes it."""
    usual = SpeculativeDecoding(method=speculation.method, model=speculation.model)
    said = {key: value for key, value in asdict(speculation).items() if value != getattr(usual, key)}
    if speculation.quantization is not None:
        said["quantization"] = str(speculation.quantization)
    said |= {"method": speculation.method, "num_speculative_tokens": speculation.num_speculative_tokens}
    return json.dumps(said | ({} if speculation.model is None else {"model": speculation.model}))


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit) * unit
