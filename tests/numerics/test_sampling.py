"""The native sampler against its specification, and both against the distribution they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.backends.cpu.program import CpuProgram
from gossamer.graph.ops.sampling import gumbel_noise, sample_row
from tests.numerics.harness import ISAS, OpGraph, make_cpu
from tests.sampling_rows import OPTIONS, logits


class Sampler:
    """A program whose logits are the rows of a table."""

    def __init__(self, logits: np.ndarray, isa: str) -> None:
        g = OpGraph()
        graph = g.finish(g.input("x", logits), vocab=logits.shape[1])
        self.count = len(logits)
        self.program: CpuProgram = make_cpu(graph, g.arrays, self.count, isa=isa)
        self.program.ids[:] = np.arange(self.count)
        self.program.rows[:] = np.arange(self.count)

    def __call__(self, rows: list[dict]) -> list[tuple[int, str]]:
        """(token, why there is none) of each row, as sample_row gives it."""
        p, history, bias_ids, bias_values, masks = self.program, [], [], [], []
        words = (p.graph.vocab + 31) // 32
        for i, r in enumerate(rows):
            prompt, output, bias = r.get("prompt_ids", ()), r.get("output_ids", ()), r.get("bias", {})
            begin = len(history)
            history += [*prompt, *output]
            bias_begin = len(bias_ids)
            bias_ids += bias.keys()
            bias_values += bias.values()
            mask_row = -1
            if (allowed := r.get("allowed")) is not None:
                mask_row = len(masks)
                padded = np.zeros(words * 32, bool)
                padded[: len(allowed)] = allowed
                masks.append(np.packbits(padded, bitorder="little").view(np.int32))
            p.sample_rows[i] = (
                r.get("temperature", 1.0), r.get("top_p", 1.0), r.get("min_p", 0.0),
                r.get("repetition_penalty", 1.0), r.get("presence_penalty", 0.0),
                r.get("frequency_penalty", 0.0), r.get("top_k", 0), 20, r.get("seed", 0),
                r.get("output_index", 0), begin, begin + len(prompt), begin + len(prompt), len(history),
                bias_begin, len(bias_ids), mask_row, r.get("target", -1),
            )  # fmt: skip
        p.bind_sampling(
            np.array(history or [0], np.int32),
            np.array(bias_ids or [0], np.int32),
            np.array(bias_values or [0], np.float32),
            np.concatenate(masks) if masks else np.zeros(1, np.int32),
        )
        p.run(len(rows), 1, len(rows), 0)
        reasons = {0: "", 1: "nan", 2: "empty"}
        return [(int(p.token[i]), reasons[int(p.bad[i])]) for i in range(len(rows))]


rows = st.fixed_dictionaries({}, optional=OPTIONS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [30, 64, 1009])
def test_follows_the_specification(isa: str, vocab: int) -> None:
    table = logits(8, vocab)
    sampler = Sampler(table, isa)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(rows, min_size=1, max_size=8))
    def check(asked: list[dict]) -> None:
        got = sampler(asked)
        for i, row in enumerate(asked):
            assert got[i] == sample_row(table[i], **row), row

    check()


@pytest.mark.parametrize("isa", ISAS)
def test_masks_nan_and_nothing_allowed(isa: str) -> None:
    vocab = 77
    table = logits(6, vocab)
    table[1, 5] = np.nan
    table[2, 76] = np.inf
    table[3] = -np.inf
    table[4, 10:] = -np.inf
    allowed = np.zeros(vocab, bool)
    allowed[[3, 40, 76]] = True
    sampler = Sampler(table, isa)
    asked: list[dict] = [{"allowed": allowed, "seed": 5}, {}, {"temperature": 0.0}, {}, {"seed": 9}]
    asked.append({"allowed": np.zeros(vocab, bool)})
    got = sampler(asked)
    assert got == [sample_row(table[i], **row) for i, row in enumerate(asked)]
    assert [why for _, why in got] == ["", "nan", "nan", "empty", "", "empty"]
    assert got[0][0] in (3, 40, 76) and got[4][0] < 10


@pytest.mark.parametrize("isa", ISAS)
def test_logprobs_are_of_the_untreated_logits(isa: str) -> None:
    table = logits(3, 200)
    sampler = Sampler(table, isa)
    tokens = sampler([{"temperature": 0.5, "top_k": 4, "seed": i, "bias": {7: 50.0}} for i in range(3)])
    want = table - np.log(np.exp(table.astype(np.float64)).sum(1, keepdims=True))
    p = sampler.program
    for i, (token, _) in enumerate(tokens):
        assert abs(p.logprob[i] - want[i, token]) < 1e-5
        order = np.argsort(-table[i], kind="stable")[:20]
        assert p.top_ids[i].tolist() == order.tolist()
        assert np.abs(p.top_logprobs[i] - want[i, order]).max() < 1e-5


@pytest.mark.parametrize("treatment", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.6}])
def test_draws_from_the_right_distribution(treatment: dict) -> None:
    """Chi-square over many seeds: 1e-6 of honest samplers would fail."""
    vocab, draws = 12, 20000
    row = logits(1, vocab, seed=3)[0] / 2
    sampler = Sampler(np.repeat(row[None], 500, 0), ISAS[-1])
    counts = np.zeros(vocab)
    for start in range(0, draws, 500):
        got = sampler([{**treatment, "seed": 7, "output_index": start + i} for i in range(500)])
        counts += np.bincount([t for t, _ in got], minlength=vocab)
    p = np.exp(row.astype(np.float64) / treatment.get("temperature", 1.0))
    order = np.argsort(-p)
    if "top_k" in treatment:
        p[order[treatment["top_k"] :]] = 0
    if "top_p" in treatment:
        p[order[np.searchsorted((p[order] / p.sum()).cumsum(), treatment["top_p"]) + 1 :]] = 0
    p /= p.sum()
    assert counts[p == 0].sum() == 0
    kept = p > 0
    chi = ((counts[kept] - draws * p[kept]) ** 2 / (draws * p[kept])).sum()
    assert chi < 60  # 11 degrees of freedom


def test_noise_depends_on_every_part_of_its_key() -> None:
    base = gumbel_noise(1, 2, 50)
    assert len(set(base)) == 50
    for other in (gumbel_noise(2, 2, 50), gumbel_noise(1, 3, 50), gumbel_noise(1 + 2**63, 2, 50)):
        assert not np.isclose(base, other).any()
