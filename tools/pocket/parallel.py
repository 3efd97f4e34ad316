"""Gradient workers: single-threaded processes that share the weights and draw micro-batches from one counter.

On cores shared with other programs a thread team waits at every operator for its slowest member. Whole
micro-batches are handed out instead, and the workers meet once per optimizer step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from data import Windows
from model import PocketConfig, build, loss
from torch import Tensor

from gossamer.backends.reference import ReferenceModel

Loss = Callable[[Tensor, Tensor], Tensor]


class GradientWorkers:
    """The caller and `count - 1` child processes, filling `.grad` together.

    The model's weights move to shared memory, so that the children see the caller's in-place updates.
    """

    def __init__(self, model: ReferenceModel, config: PocketConfig, data: Windows, function: Loss, *,
                 count: int, compiled: bool) -> None:  # fmt: skip
        context = multiprocessing.get_context("spawn")
        self.data, self.loss = data, function
        self.parameters = list(model.parameters())
        self.children = count - 1
        self.next = context.Value("q", 0)
        self.end = context.Value("q", 0)
        self.rows = context.Value("q", 0)
        self.start, self.done = context.Semaphore(0), context.Semaphore(0)
        weights = [parameter.data.share_memory_() for parameter in self.parameters]
        self.sums = [torch.zeros(1).share_memory_() for _ in range(self.children)]
        self.grads = [
            [torch.zeros_like(weight).share_memory_() for weight in weights] for _ in range(self.children)
        ]
        self.processes: list[Any] = []
        for child in range(self.children):
            signals = (self.next, self.end, self.rows, self.start, self.done)
            shared = (*signals, self.sums[child], weights, self.grads[child])
            process = context.Process(target=_serve, args=(config, data, compiled, *shared), daemon=True)
            process.start()
            self.processes.append(process)

    def gradients(self, position: int, size: int, micro: int) -> float:
        """Leaves the mean gradient of `size` windows from `position` on in `.grad`; returns the mean loss."""
        self.rows.value, self.end.value, self.next.value = micro, position + size, position
        for _ in range(self.children):
            self.start.release()
        total = _work(self.data, self.loss, self.next, self.end, micro)
        for _ in range(self.children):
            while not self.done.acquire(timeout=20):
                if not all(process.is_alive() for process in self.processes):
                    raise RuntimeError("a gradient worker died; its message is in the log")
        parts = size // micro
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                for grads in self.grads:
                    parameter.grad += grads[index]
                parameter.grad /= parts
        return (total + sum(float(value) for value in self.sums)) / parts


def training_loss(model: ReferenceModel, *, compiled: bool) -> Loss:
    """The loss of `model` over inputs and targets, as one compiled function on request."""
    function = partial(loss, model)
    return torch.compile(function) if compiled else function


def _work(data: Windows, function: Loss, position: Any, end: Any, micro: int) -> float:
    """Takes micro-batches until none is left; adds to `.grad` and returns the sum of losses."""
    total = 0.0
    while True:
        with position.get_lock():
            mine = position.value
            position.value += micro
        if mine >= end.value:
            return total
        value = function(*data.batch(mine, micro))
        value.backward()
        total += value.item()


def _serve(
    config: PocketConfig, data: Windows, compiled: bool, position: Any, end: Any, rows: Any,
    start: Any, done: Any, total: Tensor, weights: list[Tensor], grads: list[Tensor],
) -> None:  # fmt: skip
    """A child's life: wait, work, report; ends with its parent."""
    torch.set_num_threads(1)
    model = build(config)
    for parameter, weight, grad in zip(model.parameters(), weights, grads, strict=True):
        parameter.data, parameter.grad = weight, grad
    function = training_loss(model, compiled=compiled)
    parent = os.getppid()
    while True:
        if not start.acquire(timeout=20):
            if os.getppid() != parent:
                return
            continue
        for grad in grads:
            grad.zero_()
        total.fill_(_work(data, function, position, end, rows.value))
        done.release()
