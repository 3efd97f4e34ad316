"""From logits to tokens on the device, so that only ids come back: graph/ops/sampling.py specifies it, and
parameters, results and arithmetic are those of the native sampler (csrc/generic/sample.h).

A row is cut into tiles that run side by side; what they find is put together by (value, id), so that a row's
token depends on nothing but the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from gossamer.backends.cpu.plan import MAX_LOGPROBS
from gossamer.backends.cuda.kernels.sample_row import (
    LOGPROBS,
    MIN_P,
    TARGET,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    WORDS,
    field,
    gumbel_noise,
    is_treated,
    treat,
)
from gossamer.backends.cuda.kernels.selection import (
    MOST,
    NOTHING,
    cut_largest,
    cut_mass,
    id_of,
    key_of,
    mass_above,
    top_keys,
    value_of,
)
from gossamer.backends.cuda.transfer import to_device

__all__ = ["DeviceSampler", "Sampled"]

_TOP: tl.constexpr = tl.constexpr(MAX_LOGPROBS)
_HISTORY = 1024  # tokens of a history that are counted at a time
_CUT_TILE = 4096


@triton.jit
def _bad(x):
    """Whether there is a NaN or infinity: 0 or 1."""
    return tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0)


@triton.jit
def _scan_kernel(
    logits, rows, history, bias_ids, bias_values, masks, treated, raw_keys, keys, sums, bads, vocab, stride,
    TREAT: tl.constexpr, SUM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of one tile of a row: treats its logits, finds the largest, untreated and treated, looks for what is no
    number, and sums e^x."""
    r, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = r * tl.num_programs(1) + tile
    ids = tile * TILE + tl.arange(0, TILE)
    there = ids < vocab
    x = tl.load(logits + r * stride + ids, mask=there, other=float("-inf")).to(tl.float32)
    best = tl.max(tl.where(there, key_of(x, ids), NOTHING), 0)
    bad = _bad(x)
    tl.store(raw_keys + at, best)
    if SUM:
        maximum = value_of(best)
        powers = tl.exp(x - tl.where(maximum == float("-inf"), 0.0, maximum))
        tl.store(sums + at, tl.sum(powers, 0))
    if TREAT:
        row = rows + r * WORDS
        if is_treated(row):
            x = treat(x, row, history, bias_ids, bias_values, masks, tile * TILE, vocab, TILE, CHUNK)
            x = tl.where(there, x, float("-inf"))
            tl.store(treated + r * vocab + ids, x, mask=there)
            best = tl.max(tl.where(there, key_of(x, ids), NOTHING), 0)
            bad = tl.maximum(bad, _bad(x))
    tl.store(keys + at, best)
    tl.store(bads + at, bad)


@triton.jit
def _over_tiles(found, r, tiles, other, TILES: tl.constexpr):
    at = tl.arange(0, TILES)
    return tl.load(found + r * tiles + at, mask=at < tiles, other=other)


@triton.jit
def _cut_kernel(
    logits, rows, treated, keys, cuts, vocab, stride, tiles, TILES: tl.constexpr, TILE: tl.constexpr
):
    """The key of the last token that top-k and top-p leave to a row."""
    r = tl.program_id(0).to(tl.int64)
    row = rows + r * WORDS
    temperature, top_p, top_k = field(row, TEMPERATURE), field(row, TOP_P), tl.load(row + TOP_K)
    drawn = (temperature != 0.0) & (tl.load(row + TARGET) < 0)
    maximum = value_of(tl.max(_over_tiles(keys, r, tiles, NOTHING, TILES), 0))
    drawn = drawn & (maximum != float("-inf"))
    cut = tl.full((), NOTHING, tl.int64)
    if drawn & (((top_k > 0) & (top_k < vocab)) | (top_p < 1.0)):
        if is_treated(row):  # noqa: SIM108
            x = treated + r * vocab
        else:
            x = logits + r * stride
        if (top_k > 0) & (top_k < vocab):
            cut = cut_largest(x, vocab, top_k, TILE)
        if top_p < 1.0:
            mass = top_p.to(tl.float64) * mass_above(x, vocab, cut, maximum, temperature, TILE)
            cut = cut_mass(x, vocab, cut, mass, maximum, temperature, TILE)
    tl.store(cuts + r, cut)


@triton.jit
def _draw_kernel(
    logits, rows, treated, keys, cuts, drawn, vocab, stride,
    CUT: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The largest z + noise of one tile of a row, among what is left of it."""
    r, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row = rows + r * WORDS
    temperature = field(row, TEMPERATURE)
    if (temperature != 0.0) & (tl.load(row + TARGET) < 0):
        ids = tile * TILE + tl.arange(0, TILE)
        there = ids < vocab
        own = tl.zeros_like(ids) + is_treated(row).to(tl.int32) != 0  # of every id: masks are vectors
        x = tl.load(logits + r * stride + ids, mask=there & ~own, other=float("-inf"))
        y = tl.load(treated + r * vocab + ids, mask=there & own, other=float("-inf"))
        x = tl.where(own, y, x)
        maximum = value_of(tl.max(_over_tiles(keys, r, tiles, NOTHING, TILES), 0))
        z = tl.div_rn(x - maximum, tl.zeros_like(x) + temperature)
        # p >= min_p * p_max is z >= log(min_p), as the largest z is 0.
        min_p = field(row, MIN_P)
        least = tl.where(min_p < 1.0, tl.log(tl.maximum(min_p, 1e-38)), 0.0)
        least = tl.where(min_p > 0.0, least, float("-inf"))
        kept = there & (z >= least)
        if CUT:
            kept = kept & (key_of(x, ids) >= tl.load(cuts + r))
        score = tl.where(kept, z + gumbel_noise(row, ids), float("-inf"))
        tl.store(drawn + r * tiles + tile, tl.max(tl.where(there, key_of(score, ids), NOTHING), 0))


@triton.jit
def _finish_kernel(
    logits, rows, raw_keys, keys, drawn, sums, bads, token, logprob, log_mass, bad, stride, tiles,
    SAMPLE: tl.constexpr, SUM: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Puts a row's tiles together: its token, that token's log-probability, or why there is none. SAMPLE: by
    its parameters; else the largest logit is taken."""
    r = tl.program_id(0).to(tl.int64)
    best = tl.max(_over_tiles(keys, r, tiles, NOTHING, TILES), 0)
    chosen = id_of(best)
    if SAMPLE:
        row = rows + r * WORDS
        target = tl.load(row + TARGET)
        random = id_of(tl.max(_over_tiles(drawn, r, tiles, NOTHING, TILES), 0))
        chosen = tl.where(field(row, TEMPERATURE) != 0.0, random, chosen)
        chosen = tl.where(target >= 0, target, chosen)
    flag = tl.max(_over_tiles(bads, r, tiles, 0, TILES), 0)
    flag = tl.where(flag > 0, 1, tl.where(value_of(best) == float("-inf"), 2, 0))
    tl.store(token + r, tl.where(flag > 0, -1, chosen))
    tl.store(bad + r, flag.to(tl.uint8))
    if SUM:
        raws = value_of(_over_tiles(raw_keys, r, tiles, NOTHING, TILES))
        maximum = tl.max(tl.where(tl.arange(0, TILES) < tiles, raws, float("-inf")), 0)
        parts = _over_tiles(sums, r, tiles, 0.0, TILES)
        mass = tl.log(tl.sum(tl.where(parts > 0, parts * tl.exp(raws - maximum), 0.0), 0)) + maximum
        tl.store(log_mass + r, mass)
        asked = (flag == 0) & ((tl.load(row + LOGPROBS) >= 0) | (target >= 0))
        x = tl.load(logits + r * stride + chosen, mask=asked, other=0.0).to(tl.float32)
        tl.store(logprob + r, tl.where(asked, x - mass, 0.0))


@triton.jit
def _top_kernel(logits, rows, candidates, vocab, stride, TILE: tl.constexpr):
    """The largest keys of one tile of a row, as many as it asks for."""
    r, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + r * stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    keys = tl.where(ids < vocab, key_of(x, ids), NOTHING)
    count = tl.minimum(tl.load(rows + r * WORDS + LOGPROBS), _TOP)
    tl.store(candidates + (r * tl.num_programs(1) + tile) * MOST + tl.arange(0, MOST), top_keys(keys, count))


@triton.jit
def _top_of_tiles_kernel(rows, candidates, log_mass, bad, top_ids, top_logprobs, tiles, PLACES: tl.constexpr):
    """Of the candidates of a row's tiles, the largest."""
    r = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PLACES)
    count = tl.minimum(tl.load(rows + r * WORDS + LOGPROBS), _TOP)
    count = tl.where(tl.load(bad + r) > 0, 0, count)
    keys = tl.load(candidates + r * tiles * MOST + at, mask=at < tiles * MOST, other=NOTHING)
    top = top_keys(keys, count)
    slots = tl.arange(0, MOST)
    there = top != NOTHING
    to = r * _TOP + slots
    tl.store(top_ids + to, tl.where(there, id_of(top), -1), mask=slots < _TOP)
    values = tl.where(there, value_of(top) - tl.load(log_mass + r), float("-inf"))
    tl.store(top_logprobs + to, values, mask=slots < _TOP)


def _any_treated(rows: npt.NDArray[np.void]) -> np.bool_:
    """As is_treated has it: mostly there is none, and then histories, biases and masks stay on the host."""
    plain = (rows["bias_begin"] >= rows["bias_end"]) & (rows["mask_row"] < 0) & (rows["repetition"] == 1)
    return (~plain | (rows["presence"] != 0) | (rows["frequency"] != 0)).any()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Tensors on the device, a line per row, valid until the sampler's next call. token: int32, -1 where bad
    (uint8) is 1, a NaN or infinity, or 2, nothing allowed; logprob: float32, 0 unless asked for; top_ids
    (int32, -1 beyond what is asked for) and top_logprobs (float32, -inf there): [R, MAX_LOGPROBS], largest
    first, of the untreated logits, as is logprob."""

    token: torch.Tensor
    logprob: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    bad: torch.Tensor


class DeviceSampler:
    """Samples up to `rows` rows of `vocab` logits at a time; all its memory is taken at the start.

    tile: logits of a row that one program reads, a power of two of 32 at least.
    """

    def __init__(self, device: torch.device, rows: int, vocab: int, *, tile: int = 2048) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.device, self.vocab = device, vocab
        self._tile, self._tiles = tile, triton.cdiv(vocab, tile)
        self._padded = triton.next_power_of_2(self._tiles)
        self._cut_tile = min(_CUT_TILE, max(triton.next_power_of_2(vocab), 32))
        self._treated = empty(rows, vocab, dtype=torch.float32)
        self._raw_keys, self._keys, self._drawn = (empty(rows, self._tiles) for _ in range(3))
        self._sums = empty(rows, self._tiles, dtype=torch.float32)
        self._bads = empty(rows, self._tiles, dtype=torch.int32)
        self._cuts, self._log_mass = empty(rows), empty(rows, dtype=torch.float32)
        self._candidates = empty(rows, self._tiles, int(MOST.value))
        self._token, self._bad = empty(rows, dtype=torch.int32), empty(rows, dtype=torch.uint8)
        self._logprob = empty(rows, dtype=torch.float32)
        self._top_ids = empty(rows, MAX_LOGPROBS, dtype=torch.int32)
        self._top_logprobs = empty(rows, MAX_LOGPROBS, dtype=torch.float32)
        self._nothing = empty(1, dtype=torch.int32)

    @property
    def tokens(self) -> torch.Tensor:
        """int32 [rows]: what the rows of the last call got, -1 where that was nothing."""
        return self._token

    @property
    def bytes(self) -> int:
        """Of all its tensors; those of one on the meta device take none of them."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    def greedy(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token and bad, as in Sampled, of rows that take their largest logit, the lowest id among equals.
        logits: float [R, V]."""
        nothing = self._nothing
        self._scan(logits, nothing, nothing, nothing, nothing, nothing, treated=False, sums=False)
        self._finish(logits, nothing, sample=False, sums=False)
        return self._token[: len(logits)], self._bad[: len(logits)]

    def sample(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.void],
        history: npt.NDArray[np.int32],
        bias_ids: npt.NDArray[np.int32],
        bias_values: npt.NDArray[np.float32],
        masks: npt.NDArray[np.int32],
        words: torch.Tensor | None = None,
    ) -> Sampled:
        """logits: float32 [R, V]; rows: SAMPLE_ROW [R], whose ranges are of the other arrays, as
        CpuProgram.bind_sampling has them; words: the same rows where they are on the device already, int32
        [R, WORDS]. Ids are within the vocabulary, which is not checked."""
        if words is None:
            words = to_device(np.ascontiguousarray(rows).view(np.int32).reshape(len(rows), -1), self.device)
        count = len(logits)
        given = rows["target"] >= 0
        drawn = (rows["temperature"] != 0) & ~given
        top_k, top_p = rows["top_k"], rows["top_p"]
        cut = bool((drawn & (((top_k > 0) & (top_k < self.vocab)) | (top_p < 1))).any())
        sums = bool((given | (rows["logprobs"] >= 0)).any())
        treated = bool(_any_treated(rows))
        arrays = (
            to_device(a, self.device) if treated else self._nothing
            for a in (history, bias_ids, bias_values, masks)
        )
        self._scan(logits, words, *arrays, treated=treated, sums=sums)
        grid, stride, tiles = (count, self._tiles), logits.stride(0), {"TILES": self._padded}
        if cut:
            _cut_kernel[(count,)](
                logits, words, self._treated, self._keys, self._cuts, self.vocab, stride, self._tiles,
                TILE=self._cut_tile, num_warps=16, **tiles,
            )  # fmt: skip
        if drawn.any():
            _draw_kernel[grid](
                logits, words, self._treated, self._keys, self._cuts, self._drawn, self.vocab, stride,
                CUT=cut, TILE=self._tile, num_warps=8, enable_fp_fusion=False, **tiles,
            )  # fmt: skip
        self._finish(logits, words, sample=True, sums=sums)
        if not sums:
            self._logprob.zero_()
        if (rows["logprobs"] > 0).any():
            _top_kernel[grid](logits, words, self._candidates, self.vocab, stride, TILE=self._tile)
            _top_of_tiles_kernel[(count,)](
                words, self._candidates, self._log_mass, self._bad, self._top_ids, self._top_logprobs,
                self._tiles, PLACES=self._padded * int(MOST.value),
            )  # fmt: skip
        else:
            self._top_ids.fill_(-1)
            self._top_logprobs.fill_(float("-inf"))
        return Sampled(
            token=self._token[:count],
            logprob=self._logprob[:count],
            top_ids=self._top_ids[:count],
            top_logprobs=self._top_logprobs[:count],
            bad=self._bad[:count],
        )

    def _scan(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        history: torch.Tensor,
        bias_ids: torch.Tensor,
        bias_values: torch.Tensor,
        masks: torch.Tensor,
        *,
        treated: bool,
        sums: bool,
    ) -> None:
        _scan_kernel[(len(logits), self._tiles)](
            logits, rows, history, bias_ids, bias_values, masks, self._treated, self._raw_keys, self._keys,
            self._sums, self._bads, self.vocab, logits.stride(0),
            TREAT=treated, SUM=sums, TILE=self._tile, CHUNK=_HISTORY, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip

    def _finish(self, logits: torch.Tensor, rows: torch.Tensor, *, sample: bool, sums: bool) -> None:
        _finish_kernel[(len(logits),)](
            logits, rows, self._raw_keys, self._keys, self._drawn, self._sums, self._bads,
            self._token, self._logprob, self._log_mass, self._bad, logits.stride(0), self._tiles,
            SAMPLE=sample, SUM=sums, TILES=self._padded,
        )  # fmt: skip
