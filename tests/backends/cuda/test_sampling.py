"""The device's sampler against the specification: tokens, what is bad, and log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gossamer.backends.cpu.plan import SAMPLE_ROW
from gossamer.backends.cuda.kernels.sample_row import gumbel_noise as device_noise
from gossamer.graph.ops.sampling import gumbel_noise, sample_row
from tests.sampling_rows import OPTIONS
from tests.sampling_rows import logits as table

REASONS = {0: "", 1: "nan", 2: "empty"}


def sampled(logits: np.ndarray, asked: list[dict[str, Any]], device: torch.device, logprobs: int = -1) -> Any:
    """Every row of a step of its own parameters, as numpy arrays; logits lie in rows of more columns."""
    from gossamer.backends.cuda.kernels.sampling import DeviceSampler

    vocab, rows = logits.shape[1], np.zeros(len(asked), SAMPLE_ROW)
    history, bias_ids, bias_values, masks = [0], [0], [0.0], []
    for i, r in enumerate(asked):
        prompt, output, bias = r.get("prompt_ids", ()), r.get("output_ids", ()), r.get("bias", {})
        begin, bias_begin, mask_row = len(history), len(bias_ids), -1
        history += [*prompt, *output]
        bias_ids += bias.keys()
        bias_values += bias.values()
        if (allowed := r.get("allowed")) is not None:
            mask_row = len(masks)
            padded = np.zeros((vocab + 31) // 32 * 32, bool)
            padded[:vocab] = allowed
            masks.append(np.packbits(padded, bitorder="little").view(np.int32))
        rows[i] = (
            r.get("temperature", 1.0), r.get("top_p", 1.0), r.get("min_p", 0.0),
            r.get("repetition_penalty", 1.0), r.get("presence_penalty", 0.0),
            r.get("frequency_penalty", 0.0), r.get("top_k", 0), logprobs, r.get("seed", 0),
            r.get("output_index", 0), begin, begin + len(prompt), begin + len(prompt), len(history),
            bias_begin, len(bias_ids), mask_row, r.get("target", -1),
        )  # fmt: skip
    sampler = DeviceSampler(device, len(asked) + 1, vocab, tile=32)
    apart = torch.full((len(asked), vocab + 3), 1e9, device=device)
    apart[:, :vocab] = torch.from_numpy(logits)
    return sampler.sample(
        apart[:, :vocab],
        rows,
        np.array(history, np.int32),
        np.array(bias_ids, np.int32),
        np.array(bias_values, np.float32),
        np.concatenate(masks) if masks else np.zeros(1, np.int32),
    )


def tokens(result: Any) -> list[tuple[int, str]]:
    return [(t, REASONS[b]) for t, b in zip(result.token.tolist(), result.bad.tolist(), strict=True)]


ALLOWED = st.lists(st.booleans(), min_size=30, max_size=30).map(lambda a: np.array(a + a + a))
PARAMETERS = st.fixed_dictionaries({}, optional={**OPTIONS, "allowed": ALLOWED})


@pytest.mark.parametrize(("vocab", "steps"), [(30, 1.0), (77, 0.0), (77, 1.0)])
def test_follows_the_specification(vocab: int, steps: float, device: torch.device) -> None:
    """steps: logits rounded to them, so that many are equal."""
    logits = table(3, vocab)
    if steps:
        logits = np.round(logits / steps) * steps

    # Without shrinking: what fails is one row, and every attempt takes the interpreter some time.
    @settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(st.lists(PARAMETERS, min_size=1, max_size=3))
    def check(asked: list[dict[str, Any]]) -> None:
        for row in asked:
            if "allowed" in row:
                row["allowed"] = row["allowed"][:vocab]
        got = tokens(sampled(logits[: len(asked)], asked, device))
        for i, row in enumerate(asked):
            assert got[i] == sample_row(logits[i], **row), row

    check()


def test_long_histories(device: torch.device) -> None:
    """Longer than what is counted at a time."""
    logits, rng = table(2, 50), np.random.default_rng(0)
    asked = [
        {
            "temperature": 0.0,
            "prompt_ids": rng.integers(0, 25, 1500).tolist(),
            "output_ids": rng.integers(20, 45, 2100).tolist(),
            "repetition_penalty": 1.5,
            "frequency_penalty": frequency,
        }
        for frequency in (0.01, -0.01)
    ]
    assert tokens(sampled(logits, asked, device)) == [
        sample_row(logits[i], **row) for i, row in enumerate(asked)
    ]


def test_masks_nan_and_nothing_allowed(device: torch.device) -> None:
    vocab = 77
    logits = table(8, vocab)
    logits[1, 5] = np.nan
    logits[2, 76] = np.inf
    logits[3] = -np.inf
    logits[4, 10:] = -np.inf
    allowed = np.zeros(vocab, bool)
    allowed[[3, 40, 76]] = True
    asked: list[dict[str, Any]] = [
        {"allowed": allowed, "seed": 5},
        {"top_p": 0.5},
        {"temperature": 0.0},
        {"top_k": 3, "top_p": 0.2},
        {"seed": 9, "top_p": 0.9},
        {"allowed": np.zeros(vocab, bool)},
    ]
    want = [sample_row(logits[i], **row) for i, row in enumerate(asked)]
    asked += [{"bias": {3: float("inf")}}, {"target": 12}]
    got = tokens(sampled(logits, asked, device, logprobs=3))
    assert got == [*want, (-1, "nan"), (12, "")]
    assert [why for _, why in got[:6]] == ["", "nan", "nan", "empty", "", "empty"]


@pytest.mark.parametrize("asked", [-1, 0, 1, 20])
def test_logprobs_are_of_the_untreated_logits(asked: int, device: torch.device) -> None:
    logits = table(4, 100)
    logits[1] = np.round(logits[1])
    logits[2, 40:] = -np.inf
    logits[3] *= 30
    rows: list[dict[str, Any]] = [
        {"temperature": 0.5, "top_k": 4, "seed": i, "bias": {7: 50.0}} for i in range(3)
    ]
    result = sampled(logits, [*rows, {"target": 50}], device, logprobs=asked)
    exact = logits.astype(np.float64)
    highest = exact.max(1, keepdims=True)
    want = exact - highest - np.log(np.exp(exact - highest).sum(1, keepdims=True))
    for i, (token, _) in enumerate(tokens(result)):
        order = np.argsort(-logits[i], kind="stable")[: max(asked, 0)]
        if asked >= 0 or i == 3:
            assert abs(result.logprob[i].item() - want[i, token]) < 1e-5 * max(1, abs(want[i, token]))
        else:
            assert result.logprob[i] == 0
        top, rest = result.top_logprobs[i, : len(order)].cpu().numpy(), result.top_ids[i, len(order) :]
        assert result.top_ids[i, : len(order)].tolist() == order.tolist()
        np.testing.assert_allclose(top, want[i, order], rtol=1e-5, atol=1e-5)
        assert (rest == -1).all() and (result.top_logprobs[i, len(order) :] == -np.inf).all()


def test_more_logprobs_than_tokens(device: torch.device) -> None:
    result = sampled(table(1, 5), [{}], device, logprobs=20)
    assert sorted(result.top_ids[0, :5].tolist()) == [0, 1, 2, 3, 4]
    assert (result.top_ids[0, 5:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy(dtype: torch.dtype, device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.sampling import DeviceSampler

    logits = torch.from_numpy(np.round(table(6, 77))).to(device, dtype)
    logits[1, 70] = float("nan")
    logits[2, 0] = float("inf")
    logits[3] = float("-inf")
    logits[4] = 0.0
    logits[4, 0] = -0.0
    logits[5, [40, 44]] = 100.0
    token, bad = DeviceSampler(device, 8, 77, tile=32).greedy(logits)
    assert bad.tolist() == [0, 1, 1, 2, 0, 0]
    assert token.tolist() == [int(logits[0].float().cpu().numpy().argmax()), -1, -1, -1, 0, 40]


@triton.jit
def _noise_kernel(out, rows, TILE: tl.constexpr):
    ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + ids, device_noise(rows, ids))


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (2**64 - 1, 7), (2**63 + 5, 2**31 - 1)])
def test_noise_is_the_specification_s(seed: int, index: int, device: torch.device) -> None:
    """Of so many tokens that there are large ones, whose v is small."""
    rows, count = np.zeros(1, SAMPLE_ROW), 1 << 17
    rows["seed"], rows["output_index"] = seed, index
    out = torch.empty(count, device=device)
    _noise_kernel[(count // 8192,)](out, torch.from_numpy(rows.view(np.int32)).to(device), TILE=8192)
    want = gumbel_noise(seed, index, count)
    assert want.max() > 10
    np.testing.assert_allclose(out.cpu().numpy(), want, rtol=1e-6, atol=1e-6)


def test_equal_logits_leave_it_to_the_noise(device: torch.device) -> None:
    logits = np.zeros((40, 60), np.float32)
    asked = [{"seed": 2**63 + 977 * i, "output_index": 31 * i} for i in range(40)]
    got = [t for t, _ in tokens(sampled(logits, asked, device))]
    assert got == [int(gumbel_noise(a["seed"], a["output_index"], 60).argmax()) for a in asked]
    assert len(set(got)) > 20


def test_a_row_does_not_depend_on_its_company(device: torch.device) -> None:
    logits = table(4, 77)
    asked = [
        {"seed": i, "top_p": 0.9, "top_k": 30 * (i % 2), "output_ids": [i], "frequency_penalty": 1.0}
        for i in range(4)
    ]
    together = sampled(logits, asked, device, logprobs=5)
    for i, row in enumerate(asked):
        alone = sampled(logits[i : i + 1], [row], device, logprobs=5)
        for name in ("token", "logprob", "top_ids", "top_logprobs", "bad"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i])


@pytest.mark.parametrize("treatment", [{"min_p": 0.2}, {"min_p": 0.4}, {"top_k": 5}, {"top_p": 0.8}])
def test_what_is_left_to_draw_from(treatment: dict[str, float], device: torch.device) -> None:
    """Over seeds and at a temperature by which what is cut off would often win."""
    logits = np.repeat(table(1, 40), 16, 0)
    asked: list[dict[str, Any]] = [{"temperature": 3.0, "seed": i, **treatment} for i in range(16)]
    want = [sample_row(logits[i], **row) for i, row in enumerate(asked)]
    plain = [sample_row(logits[i], temperature=3.0, seed=i) for i in range(16)]
    assert want != plain
    assert tokens(sampled(logits, asked, device)) == want


def test_a_step_leaves_nothing_to_the_next(device: torch.device) -> None:
    from gossamer.backends.cuda.kernels.sampling import DeviceSampler

    sampler, nothing = DeviceSampler(device, 2, 77, tile=32), np.zeros(1, np.int32)
    rows = np.zeros(2, SAMPLE_ROW)
    rows["repetition"], rows["top_p"], rows["mask_row"], rows["target"] = 1, 1, -1, -1
    for asked in (3, -1):
        rows["logprobs"] = asked
        logits = torch.from_numpy(table(2, 77)).to(device)
        result = sampler.sample(logits, rows, nothing, nothing, np.zeros(1, np.float32), nothing)
        assert (result.logprob != 0).tolist() == [asked >= 0] * 2
        assert ((result.top_ids >= 0).sum(1) == max(asked, 0)).all()
