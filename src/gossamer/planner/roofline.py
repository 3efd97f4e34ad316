"""The time model: a step takes what its instructions take at the rates that kernels reach on this machine.

A linear layer waits for its weights or multiplies, whichever is longer (the roofline: Williams et al., 2009),
softened where both are near; attention and the ops over rows take a time for each number; every instruction
has its overhead, and so has Python around the step. `planner/efficiencies.py` holds the rates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from gossamer.config import EngineConfig
from gossamer.graph.ir import Graph
from gossamer.planner.efficiencies import Efficiencies, LinearRate, peak_of, scaled_peaks
from gossamer.planner.hardware import Rates, cache_bytes
from gossamer.planner.work import AttentionWork, ExpertsWork, LinearWork, StepWork, VectorWork, step_work
from gossamer.planner.workload import Workload

__all__ = ["Prediction", "Spans", "Speculation", "StepModel", "expected_tokens", "linear_seconds", "predict"]

Spans = Sequence[tuple[int, int, int]]
"""Equal sequences of a step: (how many, tokens that each has computed before, tokens of each in it)."""

SOFTNESS = 2.5  # of the maximum of two times; infinity: the greater alone
_KV_SOFTNESS = 1.3  # keys are asked for ahead by a little only
PASSING_GB_S = 85.0  # what a thread takes from the last cache: bytes from memory pass through it, too
_CACHED, _STREAMED = (
    0.5,
    1.25,
)  # of the last cache: what is read in a step is in it up to here; none of it from here
_SCATTERED_GB_S = 30.0  # of a thread, which waits at the start of every expert: they are small and lie apart
_ATTENTION_ROWS = 32  # csrc/generic/attention_tile.h: kAttentionRows
_ATTENTION_TILE = 64  # kTile
_TILE_WORK = 16384  # csrc/program.h: kTileWork
_BLOCK = 16  # keys that are read together, and what head sizes are padded to
_UNIT_ROWS = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """ttft_ms: of a prompt that comes alone; itl_ms: between a request's tokens with the workload's
    concurrency in decode; decode_tokens_per_s: of all sequences in decode together; tokens_per_s: output of
    requests that come as fast as others end, prefill included; parts: (what, ms) of a decode step. origin:
    whence the efficiencies are."""

    ttft_ms: float
    itl_ms: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    tokens_per_s: float
    parts: tuple[tuple[str, float], ...]
    origin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """What is known of drafts. acceptance: how likely a guess is right that follows right ones; draft: the
    draft's graph after its passes, None where guesses cost nothing (ngram)."""

    acceptance: float
    draft: Graph | None = None


def linear_seconds(
    rate: LinearRate,
    work: LinearWork,
    rows: float,
    *,
    peak: float,
    read: float,
    missed: float,
    clock: float,
    threads: int,
) -> float:
    """Of one linear layer. peak: multiply-accumulates per second of its format; read: bytes per second from
    memory; missed: part of its weights that caches do not hold; clock: speed of the processor over the one
    that the rate was measured at."""
    passing = PASSING_GB_S * 1e9 * threads * clock
    fetching = missed * work.bytes * (1 / (read * rate.bandwidth) + 1 / passing)
    multiplying = work.inputs * work.multiplied * rows / (peak * rate.part(rows))
    output = (rate.head_ns if work.head else rate.output_ns) * 1e-9 * work.outputs * rows / threads / clock
    return soft_maximum(fetching, multiplying + output) + rate.overhead_us * 1e-6 / clock


def soft_maximum(a: float, b: float, softness: float = SOFTNESS) -> float:
    """The p-norm of two times: their maximum where they differ, somewhat more where they do not."""
    top = max(a, b)
    return top * (1.0 + (min(a, b) / top) ** softness) ** (1.0 / softness) if top else 0.0


class StepModel:
    """Times of the steps of one graph (after its passes) under one configuration. Times are in seconds."""

    def __init__(self, graph: Graph, config: EngineConfig, rates: Rates, efficiencies: Efficiencies) -> None:
        self.work: StepWork = _work(graph, config.kv_dtype)
        kernels, parallel = config.hardware_kernels, config.parallel_computing
        isa = "scalar" if kernels is None else kernels.isa or rates.isa
        self.threads = 1 if parallel is None else parallel.threads or rates.threads
        self.efficiencies = efficiencies
        self._table = efficiencies.table(isa, self.threads, rates)
        self._peaks = scaled_peaks(rates, isa, self.threads, efficiencies)
        own = self._table.peaks
        self._clock = sorted(self._peaks[name] / self.threads / own[name] for name in own)[len(own) // 2]
        share = [min(1.0, efficiencies.single_read * n) for n in (self.threads, rates.threads)]
        self._read = rates.read_gb_s * 1e9 * min(1.0, share[0] / share[1])
        self._unit_rows = _UNIT_ROWS if config.layer_fusion is None else config.layer_fusion.rows
        self._kv = self._table.attention.get(config.kv_dtype) or self._table.attention["bf16"]
        self._caches = _cache_bytes()[1] * efficiencies.last_caches(isa, self._table)

    def parts(self, spans: Spans, rows: int) -> dict[str, float]:
        """Seconds of a step by cause. rows: how many tokens are sampled."""
        tokens = sum(count * new for count, _, new in spans)
        sequences = sum(count for count, _, _ in spans)
        prompt = sum(count * new for count, _, new in spans if new > 1)
        kv = self.work.token_bytes * sum(count * (before + new) for count, before, new in spans)
        # Other experts are read in the next step: in the end all of them pass through the caches.
        experts = sum(c * w.count * w.bytes for w, c in self.work.works if isinstance(w, ExpertsWork))
        footprint = self.work.matrix_bytes + experts + kv
        missed = min(1.0, max(0.0, (footprint / max(self._caches, 1) - _CACHED) / (_STREAMED - _CACHED)))
        found: dict[str, float] = defaultdict(float)
        for work, count in self.work.works:
            done = rows if not isinstance(work, AttentionWork | ExpertsWork) and work.sampled else tokens
            if not done:
                continue
            tiles = math.ceil(done / self._unit_rows) if work.unit else 1
            if isinstance(work, LinearWork):
                name = "head" if work.head else f"weights {work.stored}"
                found[name] += count * tiles * self._linear(work, done / tiles, missed)
            elif isinstance(work, VectorWork):
                found["norms, activations and KV writes"] += count * tiles * self._vector(work, done / tiles)
            elif isinstance(work, AttentionWork):
                found["attention"] += count * self._attention(work, spans, missed)
            else:
                found[f"experts {work.stored}"] += count * tiles * self._experts(work, done / tiles, missed)
        phase = self.efficiencies.correction("prefill" if prompt else "decode", self.work.stored)
        for name in found:
            found[name] *= phase
        python = self.efficiencies.python
        cold = min(1.0, footprint / (2.0 * max(self._caches, 1))) * python.cold_us
        found["Python, of the step"] = (python.step_us + cold) * 1e-6 / self._clock
        found["Python, of its sequences"] = python.sequence_us * sequences * 1e-6 / self._clock
        if prompt:
            found["Python, of prompts"] = python.token_us * prompt * 1e-6 / self._clock
        return dict(found)

    def seconds(self, spans: Spans, rows: int) -> float:
        """Of a step, Python included."""
        return sum(self.parts(spans, rows).values())

    def request_seconds(self) -> float:
        """Of Python, once for each request."""
        return self.efficiencies.python.request_us * 1e-6 / self._clock

    def _linear(self, work: LinearWork, rows: float, missed: float) -> float:
        return linear_seconds(
            self._table.linear_of(work.stored),
            work,
            rows,
            peak=self._peaks[peak_of(work.stored)] * 1e9,
            read=self._read,
            missed=missed,
            clock=self._clock,
            threads=self.threads,
        )

    def _vector(self, work: VectorWork, rows: float) -> float:
        rate = self._table.vector_of(work.name)
        return vector_seconds(rate.overhead_us, rate.number_ns, work.width, rows, self.threads) / self._clock

    def _experts(self, work: ExpertsWork, tokens: float, missed: float) -> float:
        """Experts that tokens chose are linear layers over their share of the rows."""
        touched = work.touched(tokens)
        as_linear = LinearWork(
            work.stored, work.inputs, 3 * work.width, work.inputs, int(work.bytes), False, False, False
        )
        whole = self._linear(as_linear, tokens * work.chosen / touched, missed)
        whole += missed * work.bytes / (_SCATTERED_GB_S * 1e9 * self.threads * self._clock)
        overhead = self._table.linear_of(work.stored).overhead_us * 1e-6 / self._clock
        return touched * (whole - overhead) + 3 * overhead

    def _attention(self, work: AttentionWork, spans: Spans, missed: float) -> float:
        rate = self._kv
        counts = attention_counts(work, spans, self.threads)
        busy = (
            rate.tile_us * 1e-6 * counts.tiles
            + rate.row_us * 1e-6 * counts.rows
            + 1e-9 * (rate.key_ns * counts.keys + rate.pair_ns * counts.pairs)
        )
        reading = missed * work.token_bytes * counts.tokens / self._read
        return soft_maximum(reading, busy / self._clock, _KV_SOFTNESS) + rate.overhead_us * 1e-6 / self._clock


@dataclass(frozen=True, slots=True)
class AttentionCounts:
    """Of one layer in a step, shared out to threads: tiles, their rows (query times head), numbers of keys
    and values read, and those times the rows that multiply them; tokens: whose keys are read, in all."""

    tiles: float
    rows: float
    keys: float
    pairs: float
    tokens: float


def attention_counts(work: AttentionWork, spans: Spans, threads: int) -> AttentionCounts:
    """What the busiest thread has to do."""
    group = work.heads // work.kv_heads
    numbers = 2 * math.ceil(work.head_dim / _BLOCK) * _BLOCK  # of a key and a value, padded
    jobs = tiles = rows = keys = pairs = read = 0.0
    for count, before, new in spans:
        heads = min(group, _ATTENTION_TILE)
        height = min(_ATTENTION_ROWS, _ATTENTION_TILE // heads, new)
        tall = math.ceil(new / height)
        jobs += count * work.kv_heads * math.ceil(new / _ATTENTION_ROWS)
        # The tiles of a prompt see ever more keys: their mean is that of the first and the last.
        first, last = before + min(height, new), before + new
        seen = (first + last) / 2 if tall > 1 else last
        if work.window is not None:
            seen = min(seen, work.window + height)
        seen = math.ceil(seen / _BLOCK) * _BLOCK
        tiles += count * work.kv_heads * tall * math.ceil(group / heads)
        rows += count * work.heads * new
        keys += count * work.kv_heads * tall * math.ceil(group / heads) * seen * numbers
        pairs += count * work.heads * new * seen * numbers
        read += count * min(before + new, work.window or before + new)
    share = math.ceil(jobs / threads) / jobs if jobs else 0.0
    return AttentionCounts(tiles * share, rows * share, keys * share, pairs * share, read)


def vector_seconds(overhead_us: float, number_ns: float, width: int, rows: float, threads: int) -> float:
    """Of an op over rows: little work stays with one thread."""
    tiles = max(1.0, min(rows, rows * width / _TILE_WORK))
    share = math.ceil(tiles / threads) / tiles if tiles > 1 else 1.0
    return overhead_us * 1e-6 + number_ns * 1e-9 * rows * width * share


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens that a step of a chain of guesses brings, its own included (Leviathan et al., 2023, eq. 1)."""
    return float(drafted + 1) if acceptance >= 1 else (1 - acceptance ** (drafted + 1)) / (1 - acceptance)


def predict(
    graph: Graph,
    config: EngineConfig,
    work: Workload,
    rates: Rates,
    efficiencies: Efficiencies,
    *,
    speculation: Speculation | None = None,
) -> Prediction:
    """What a configuration would do. graph: after its passes. speculation: without it guesses are taken to
    bring nothing, since what they bring depends on the text."""
    model = StepModel(graph, config, rates, efficiencies)
    running = min(work.concurrency, config.max_num_seqs)
    middle = work.prompt_tokens + work.output_tokens // 2
    parts, brought = _decode(model, config, running, middle, speculation, rates)
    step = sum(parts.values())
    ttft = model.request_seconds() + prefill_seconds(model, config, work.prompt_tokens)
    # Requests end one by one, and a newcomer's prompt lengthens the steps that compute it.
    beside = _beside(model, config, running, work.prompt_tokens, middle) + model.request_seconds()
    cycle = efficiencies.unevenness * (work.output_tokens / brought * step + running * beside)
    return Prediction(
        ttft_ms=1e3 * ttft,
        itl_ms=1e3 * step / brought,
        prefill_tokens_per_s=work.prompt_tokens / ttft,
        decode_tokens_per_s=running * brought / step,
        tokens_per_s=running * work.output_tokens / cycle,
        parts=tuple((name, 1e3 * seconds) for name, seconds in parts.items()),
        origin=efficiencies.origin,
    )


def prefill_seconds(model: StepModel, config: EngineConfig, prompt: int, sequences: int = 1) -> float:
    """Of the steps that compute so many prompts of a length, nothing else running; the last one samples."""
    return sum(
        model.seconds([(1, *span) for span in step], rows)
        for step, rows in prefill_steps(prompt, sequences, prefill_chunk(config))
    )


def prefill_steps(prompt: int, sequences: int, most: int) -> list[tuple[list[tuple[int, int]], int]]:
    """Steps of at most so many tokens: their (tokens before, tokens) and the rows they sample."""
    steps: list[tuple[list[tuple[int, int]], int]] = []
    spans: list[tuple[int, int]] = []
    room, rows = most, 0
    for _ in range(sequences):
        done = 0
        while done < prompt:
            take = min(room, prompt - done)
            spans.append((done, take))
            done, room = done + take, room - take
            rows += done == prompt
            if not room:
                steps.append((spans, rows))
                spans, room, rows = [], most, 0
    if spans:
        steps.append((spans, rows))
    return steps


def _decode(
    model: StepModel,
    config: EngineConfig,
    running: int,
    context: int,
    speculation: Speculation | None,
    rates: Rates,
) -> tuple[dict[str, float], float]:
    """Parts of a decode step, and the tokens it brings to each sequence."""
    wanted = config.speculative_decoding
    if wanted is None or speculation is None or speculation.acceptance <= 0:
        return model.parts([(running, context, 1)], running), 1.0
    guesses = wanted.num_speculative_tokens
    parts = model.parts([(running, context, guesses + 1)], running * (guesses + 1))
    if speculation.draft is not None:
        beside = StepModel(
            speculation.draft, replace(config, speculative_decoding=None), rates, model.efficiencies
        )
        parts["drafts"] = guesses * beside.seconds([(running, context, 1)], running)
    return parts, expected_tokens(speculation.acceptance, guesses)


def _beside(model: StepModel, config: EngineConfig, running: int, prompt: int, context: int) -> float:
    """Seconds that a prompt adds to the steps which compute it, beside the others in decode."""
    others = running - 1
    if not others:
        return prefill_seconds(model, config, prompt)
    most = max(1, prefill_chunk(config) - others)
    alone = model.seconds([(others, context, 1)], others)
    added = 0.0
    for spans, rows in prefill_steps(prompt, 1, most):
        whole = [(others, context, 1), *((1, *span) for span in spans)]
        added += model.seconds(whole, others + rows) - alone
    return added


def prefill_chunk(config: EngineConfig) -> int:
    batching = config.continuous_batching
    chunk = None if batching is None else batching.prefill_chunk
    return config.max_num_batched_tokens if chunk is None else min(chunk, config.max_num_batched_tokens)


_WORKS: dict[tuple[int, str], tuple[Graph, StepWork]] = {}


def _work(graph: Graph, kv_dtype: str) -> StepWork:
    """A search asks for the same graph again and again."""
    key = (id(graph), kv_dtype)
    held = _WORKS.get(key)
    if held is None or held[0] is not graph:
        if len(_WORKS) > 64:
            _WORKS.clear()
        held = _WORKS[key] = (graph, step_work(graph, kv_dtype))
    return held[1]


@cache
def _cache_bytes() -> tuple[int, int]:
    return cache_bytes()
