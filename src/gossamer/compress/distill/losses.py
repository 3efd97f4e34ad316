"""What a student's predictions are judged by: cross entropy, and divergences from a teacher's.

Divergences at a temperature are multiplied by its square, so that their gradients keep their size (Hinton et
al. 2015). Of a teacher of which only the largest probabilities are known, everything else is one outcome:
the divergence between the two distributions over K + 1 outcomes, which is never more than the whole one.

Shape legend: T tokens, V vocabulary, K outcomes kept of a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FullTarget", "Target", "TopTarget", "cross_entropy", "distances", "divergence", "row_by_row"]

IGNORED = -100
"""A token that nothing is to be predicted for."""
_ROWS = 32  # of logits judged at a time: what is made of them stays in the processor's cache
_LEAST = 1e-30  # no probability is less: its logarithm is finite


@dataclass(frozen=True, slots=True)
class FullTarget:
    """All of a teacher's logits [T, V]."""

    logits: Tensor

    def rows(self, rows: slice) -> FullTarget:
        """Some tokens of it."""
        return FullTarget(self.logits[rows])

    def log_p(self, temperature: float) -> Tensor:
        """Log probabilities [T, V], float32."""
        return (self.logits.float() / temperature).log_softmax(-1)

    def log_q(self, log_q: Tensor) -> Tensor:
        """A student's log probabilities [T, V] over the same outcomes."""
        return log_q


@dataclass(frozen=True, slots=True)
class TopTarget:
    """A teacher's largest probabilities: tokens [T, K], their log probabilities [T, K] and the share of all
    others [T], at the temperature they were kept at."""

    ids: Tensor
    logs: Tensor
    rest: Tensor

    def rows(self, rows: slice) -> TopTarget:
        """Some tokens of it."""
        return TopTarget(self.ids[rows], self.logs[rows], self.rest[rows])

    def log_p(self, temperature: float) -> Tensor:
        """Log probabilities [T, K + 1]."""
        return torch.cat((self.logs.float(), self.rest.float().clamp(min=_LEAST).log()[:, None]), -1)

    def log_q(self, log_q: Tensor) -> Tensor:
        """[T, V] as [T, K + 1]."""
        others = log_q.scatter(-1, self.ids, -1e9).logsumexp(-1, keepdim=True)
        return torch.cat((log_q.gather(-1, self.ids), others), -1)


Target = FullTarget | TopTarget


def cross_entropy(log_q: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens, in nats. log_q: log probabilities [T, V], targets [T] (IGNORED ones count nothing)."""
    return F.nll_loss(log_q, targets, ignore_index=IGNORED, reduction="sum")


def divergence(kind: str, log_q: Tensor, target: Target, temperature: float = 1.0) -> Tensor:
    """Sum over tokens of the divergence between a teacher and a student's log probabilities [T, V] at a
    temperature, in nats, times the temperature squared.

    kind: "forward_kl" (Hinton et al. 2015), "reverse_kl" (Gu et al., MiniLLM, 2024) or "js", half of each to
    their mean (Agarwal et al. 2024).
    """
    log_p = target.log_p(temperature)
    log_q = target.log_q(log_q)
    if kind == "forward_kl":
        sum_ = _kl(log_p, log_q)
    elif kind == "reverse_kl":
        sum_ = _kl(log_q, log_p)
    elif kind == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        sum_ = (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    else:
        raise ValueError(f"no divergence {kind!r}")
    return sum_ * temperature**2


def distances(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error [] relative to the mean square of what is wanted, float32: 1 is a guess of zero."""
    wanted = wanted.float()
    return F.mse_loss(given.float(), wanted) / wanted.square().mean().clamp(min=_LEAST)


def row_by_row(
    logits: Tensor, judge: Callable[[Tensor, slice], Tensor], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """A weighted sum of losses over tokens, judged few rows at a time: nothing else of the size of the
    logits is ever in memory but their gradient, and it is several times faster.

    logits [T, V] of any float type; judge(logits of some rows in float32, which rows) gives the sums of each
    loss over these rows [N]; weights [N]. Gives the differentiable weighted sum [] and the sums [N].
    """
    total, sums = _RowByRow.apply(logits, judge, weights)  # type: ignore[no-untyped-call]
    return total, sums


class _RowByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, judge: Callable[[Tensor, slice], Tensor], weights: Tensor) -> Any:
        sums = torch.zeros_like(weights)
        gradient = torch.empty_like(logits)
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, min(start + _ROWS, len(logits)))
            part = logits[rows].detach().float().requires_grad_()
            with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
                losses = judge(part, rows)
                (gradient[rows],) = torch.autograd.grad((losses * weights).sum(), part)
            sums += losses.detach()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return (sums * weights).sum(), sums

    @staticmethod
    def backward(ctx: Any, total: Tensor, sums: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * total.to(gradient.dtype), None, None


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return F.kl_div(log_b, log_a, log_target=True, reduction="sum")
