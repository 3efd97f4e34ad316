"""Losses are the divergences they are called, and judging few rows at a time changes nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="compression needs torch (pip install gossamer[torch])")

from torch.nn import functional as F  # noqa: E402

from gossamer.compress.distill.losses import (  # noqa: E402
    IGNORED,
    FullTarget,
    Target,
    TopTarget,
    cross_entropy,
    distances,
    divergence,
    row_by_row,
)

KINDS = ("forward_kl", "reverse_kl", "js")


def logits(rows: int, vocab: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) * 3


def top(target: torch.Tensor, kept: int, temperature: float) -> TopTarget:
    log_p = FullTarget(target).log_p(temperature)
    logs, ids = log_p.topk(kept)
    return TopTarget(ids, logs, log_p.scatter(-1, ids, float("-inf")).exp().sum(-1))


def log_q(student: torch.Tensor, temperature: float) -> torch.Tensor:
    return (student / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_by_their_definitions(temperature: float) -> None:
    t, s = logits(7, 11, 0), logits(7, 11, 1)
    p, q = (t / temperature).double().softmax(-1), (s / temperature).double().softmax(-1)
    m = (p + q) / 2
    wanted = {
        "forward_kl": (p * (p / q).log()).sum(),
        "reverse_kl": (q * (q / p).log()).sum(),
        "js": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
    }
    for kind, value in wanted.items():
        got = divergence(kind, log_q(s, temperature), FullTarget(t), temperature)
        assert float(got) == pytest.approx(float(value) * temperature**2, rel=1e-4)


def test_forward_kl_pulls_as_hard_at_any_temperature() -> None:
    t, s = logits(64, 11, 0) / 30, logits(64, 11, 1) / 30
    sizes = []
    for temperature in (1.0, 4.0):
        x = s.clone().requires_grad_()
        divergence("forward_kl", log_q(x, temperature), FullTarget(t), temperature).backward()
        assert x.grad is not None
        sizes.append(float(x.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(0, 1000), st.sampled_from([1.0, 2.0]))
def test_what_is_left_out_is_one_outcome(kind: str, kept: int, seed: int, temperature: float) -> None:
    t, s = logits(5, 12, seed), logits(5, 12, seed + 1)
    q = log_q(s, temperature)
    whole = float(divergence(kind, q, FullTarget(t), temperature))
    part = float(divergence(kind, q, top(t, kept, temperature), temperature))
    assert -1e-4 <= part <= whole + 1e-4 * (1 + whole)  # data processing inequality
    if kept >= 11:  # the rest is one token, or none
        assert part == pytest.approx(whole, rel=1e-3, abs=1e-3)
    same = float(divergence(kind, log_q(t, temperature), top(t, kept, temperature), temperature))
    assert same == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [3, 12])
def test_gradients_of_kept_targets_are_finite_and_right(kind: str, kept: int) -> None:
    t = logits(4, 12, 0)
    target = top(t, kept, 1.0)
    student = logits(4, 12, 1).requires_grad_()
    value = divergence(kind, log_q(student, 1.0), target)
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.isfinite(gradient).all()
    direction = logits(4, 12, 2)
    with torch.no_grad():
        ahead, behind = (
            float(divergence(kind, log_q(student + h * direction, 1.0), target)) for h in (1e-3, -1e-3)
        )
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / 2e-3, rel=0.02, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_judged_in_parts_give_the_whole_s_loss_and_gradient(dtype: torch.dtype) -> None:
    target: Target = FullTarget(logits(75, 19, 0))
    wanted = torch.arange(75) % 19
    wanted[::7] = IGNORED
    weights = torch.tensor([0.3, 0.7])

    def judge(part: torch.Tensor, rows: slice) -> torch.Tensor:
        q = part.log_softmax(-1)
        return torch.stack((cross_entropy(q, wanted[rows]), divergence("forward_kl", q, target.rows(rows))))

    by_row, whole = (logits(75, 19, 1).to(dtype).requires_grad_() for _ in range(2))
    total, sums = row_by_row(by_row, judge, weights)
    (total * 2).backward()
    losses = judge(whole.float(), slice(0, 75))
    ((losses * weights).sum() * 2).backward()
    losses = losses.detach()
    torch.testing.assert_close(sums, losses, rtol=1e-4, atol=1e-4)
    assert float(losses[0]) == pytest.approx(
        float(F.cross_entropy(whole.detach().float(), wanted, reduction="sum", ignore_index=IGNORED)),
        rel=1e-5,
    )
    assert by_row.grad is not None and whole.grad is not None and by_row.grad.dtype == dtype
    torch.testing.assert_close(
        by_row.grad, whole.grad, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5
    )


def test_distances_are_relative_to_what_is_wanted() -> None:
    wanted = logits(5, 8, 0) * 100
    assert float(distances(torch.zeros(5, 8), wanted)) == pytest.approx(1.0)
    assert float(distances(wanted, wanted)) == 0.0
    assert math.isfinite(float(distances(wanted, torch.zeros(5, 8))))
