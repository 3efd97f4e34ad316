"""Moves of tokens and pages against plain slices."""

from __future__ import annotations

import pytest
import torch

from gossamer.backends.cuda.kernels.kv_copy import HostPages, Move, copy_tokens

PAGES, PAGE = 5, 16


def pools(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> list[torch.Tensor]:
    """Keys, values, and scales as int8 has them: three layers."""
    shape = (3, PAGES, PAGE, heads, head_dim)
    generator = torch.Generator().manual_seed(1)
    numbers = [torch.randint(-100, 100, shape, generator=generator).to(device, dtype) for _ in range(2)]
    return [*numbers, torch.randn(shape[:4], generator=generator).to(device)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (3, 40), (2, 1024)])
def test_moves_in_order(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> None:
    got = pools(device, dtype, heads, head_dim)
    want = [pool.clone() for pool in got]
    moves = [
        Move(0, 3, 1, 5, 7),
        Move(1, 5, 2, 0, 9),  # reads what the first wrote
        Move(2, 4, 2, 1, 10),  # overlaps itself
        Move(4, 0, 0, 0, 16),
        Move(3, 15, 3, 0, 1),
        Move(3, 1, 4, 1, 0),
    ]
    copy_tokens(got, moves)
    for m in moves:
        for pool in want:
            taken = pool[:, m.source, m.source_slot : m.source_slot + m.tokens].clone()
            pool[:, m.target, m.target_slot : m.target_slot + m.tokens] = taken
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    copy_tokens(got, [])


def test_pools_may_be_parts_of_others(device: torch.device) -> None:
    whole = torch.randn(3, PAGES, 2, PAGE, 24, device=device)
    keys = whole[:, :, 1, :, 1:]  # begins in the middle of a wide word
    want = keys.clone()
    want[:, 2, :4] = want[:, 0, 3:7]
    beside = whole[:, :, 0].clone()
    copy_tokens([keys], [Move(0, 3, 2, 0, 4)])
    assert torch.equal(keys, want)
    assert torch.equal(whole[:, :, 0], beside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_pages_to_host_memory_and_back(device: torch.device, dtype: torch.dtype) -> None:
    tensors = pools(device, dtype, 2, 24)
    before = [pool.clone() for pool in tensors]
    host = HostPages(tensors, 2)
    assert host.bytes == 2 * sum(pool[:, 0].nbytes for pool in tensors)
    host.write(3, 1)
    host.write(0, 0)
    host.wait()
    for pool in tensors:
        pool[:, 3] = 0
        pool[:, 0] = 0
    host.read(1, 2)
    host.read(0, 3)
    host.wait()
    for pool, old in zip(tensors, before, strict=True):
        assert torch.equal(pool[:, 2], old[:, 3])
        assert torch.equal(pool[:, 3], old[:, 0])
        assert torch.equal(pool[:, [1, 4]], old[:, [1, 4]])
