"""Mixture-of-experts MLPs: tokens sorted by expert on the device, then one launch over all experts' tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gossamer.backends.cuda.kernels.elementwise import activate
from gossamer.backends.cuda.kernels.gemm import block_rows, laid_out
from gossamer.backends.cuda.kernels.tiles import BLOCK_K, dot_type, steps_of, tile
from gossamer.backends.cuda.packing import PackedWeight

__all__ = ["Routes", "experts", "sort_by_expert"]

_BLOCK_N = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """Slots (a token's choices, [T, k] flat) in the order of their experts, cut into blocks of equal experts.

    order: int32 [T * k], the slot at each place. starts: int32 [experts + 1], an expert's first place.
    block_experts, block_firsts: int32 [blocks], of each block; experts says that a block is not used. How
    many are is known on the device alone, so there are as many as any routing may need.
    """

    order: torch.Tensor
    starts: torch.Tensor
    block_experts: torch.Tensor
    block_firsts: torch.Tensor


def sort_by_expert(ids: torch.Tensor, count: int, block: int) -> Routes:
    """Routes of ids [T, k] (integers below `count`) in blocks of `block` rows; the host waits for nothing."""
    flat = ids.flatten()
    chosen, order = flat.sort(stable=True)
    each = torch.arange(count + 1, device=ids.device, dtype=chosen.dtype)
    starts = torch.searchsorted(chosen, each)
    ends = torch.cumsum((starts[1:] - starts[:-1] + block - 1) // block, 0)
    most = min(flat.numel(), flat.numel() // block + count)
    blocks = torch.arange(most, device=ids.device)
    expert = torch.searchsorted(ends, blocks, right=True)
    before = torch.cat([ends.new_zeros(1), ends])[expert]
    firsts = starts[expert] + (blocks - before) * block
    return Routes(
        order=order.int(), starts=starts.int(), block_experts=expert.int(), block_firsts=firsts.int()
    )


@triton.jit
def _experts(
    out_ptr, x_ptr, w_ptr, s_ptr, z_ptr, up_ptr, up_s_ptr, up_z_ptr, levels_ptr, order_ptr, starts_ptr,
    block_experts_ptr, block_firsts_ptr, experts, N, K, x_row, x_plane, w_row, s_row, out_row, steps,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, PLANAR: tl.constexpr, DOT: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """GATED: place p reads the token of its slot, and p is written; else it reads p and writes its slot."""
    block = tl.program_id(1)
    expert = tl.load(block_experts_ptr + block)
    if expert < experts:
        places = tl.load(block_firsts_ptr + block) + tl.arange(0, BLOCK_M)
        there = places < tl.load(starts_ptr + expert + 1)
        slot = tl.load(order_ptr + places, there, 0)
        read, write = places, slot
        if GATED:
            read, write = slot // SLOTS, places
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        columns_in = columns < N
        x_ptrs = x_ptr + read.to(tl.int64) * x_row
        # Matrices of experts lie one after the other: row n of expert e is row e * N + n.
        stored = tl.where(columns_in, columns, 0).to(tl.int64) + expert.to(tl.int64) * N
        y = tile(
            x_ptrs, there, w_ptr, s_ptr, z_ptr, levels_ptr, stored, columns_in, K, x_plane, w_row, s_row,
            0, steps, FORMAT, GROUP, PLANAR, DOT, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if GATED:
            y = activate(y, ACT) * tile(
                x_ptrs, there, up_ptr, up_s_ptr, up_z_ptr, levels_ptr, stored, columns_in, K, x_plane,
                w_row, s_row, 0, steps, FORMAT, GROUP, PLANAR, DOT, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        out_ptrs = out_ptr + write.to(tl.int64)[:, None] * out_row + columns[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), there[:, None] & columns_in[None, :])


@triton.jit
def _sum_slots(
    out_ptr, slots_ptr, gains_ptr, residual_ptr, N, out_row, residual_row, SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # the first axis alone goes beyond 65535
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = columns < N
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for slot in tl.static_range(SLOTS):
        gain = tl.load(gains_ptr + row * SLOTS + slot).to(tl.float32)
        acc += gain * tl.load(slots_ptr + (row * SLOTS + slot) * N + columns, there, 0.0)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + row * residual_row + columns, there, 0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + columns, acc.to(out_ptr.dtype.element_ty), there)


def experts(
    out: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    gains: torch.Tensor,
    weights: tuple[PackedWeight, PackedWeight, PackedWeight],
    *,
    act: str,
    residual: torch.Tensor | None = None,
) -> str:
    """out [T, hidden] = residual + the sum over a token's slots, in their order, of
    gain * down[e](act(gate[e] x) * up[e] x).

    x: float32, float16 or bfloat16 [T, hidden], T at least 1; ids: int32 or int64 [T, k]; gains: floats
    [T, k]; weights: gate and up [experts, width, hidden] of one format, down [experts, hidden, width], of any
    format; out and residual: any float type. What lies between the two products is of x's type. Gives the
    name of the kernel, for receipts.
    """
    gate, up, down = weights
    rows, chosen = ids.shape
    count, width = gate.shape[0], gate.shape[1]
    # Tokens spread over experts: a block taller than an expert's share would mostly be empty.
    block = block_rows(min(64, triton.cdiv(rows * chosen, count)))
    routes = sort_by_expert(ids, count, block)
    hidden = torch.empty((rows * chosen, width), dtype=x.dtype, device=x.device)
    _launch(hidden, x, gate, up, routes, chosen, act, block)
    slots = torch.empty((rows * chosen, out.shape[1]), dtype=torch.float32, device=x.device)
    _launch(slots, hidden, down, None, routes, chosen, None, block)
    block_n = min(1024, triton.next_power_of_2(out.shape[1]))
    _sum_slots[rows, triton.cdiv(out.shape[1], block_n)](
        out, slots, gains.contiguous(), residual, out.shape[1], out.stride(0),
        0 if residual is None else residual.stride(0), SLOTS=chosen, BLOCK_N=block_n,
    )  # fmt: skip
    return f"experts_{gate.stored}"


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: PackedWeight,
    up: PackedWeight | None,
    routes: Routes,
    chosen: int,
    act: str | None,
    block: int,
) -> None:
    """One product of every place with its expert's matrix, or two and a gate."""
    if weight.format == "bf16":
        x = x.to(torch.bfloat16)
    x, planar, x_plane = laid_out(x, weight)
    count, columns, k = weight.shape
    _experts[triton.cdiv(columns, _BLOCK_N), routes.block_experts.numel()](
        out, x, weight.data, weight.scales, weight.zeros, up and up.data, up and up.scales, up and up.zeros,
        weight.levels, routes.order, routes.starts, routes.block_experts, routes.block_firsts,
        count, columns, k, x.stride(0), x_plane, weight.data.stride(1),
        weight.scales.stride(1) if weight.scales is not None and weight.group else 0, out.stride(0),
        steps_of(weight),
        FORMAT=weight.format, GROUP=weight.group, PLANAR=planar, DOT=dot_type(x, weight), ACT=act,
        GATED=up is not None, SLOTS=chosen, BLOCK_M=block, BLOCK_N=_BLOCK_N, BLOCK_K=BLOCK_K,
        num_warps=4, num_stages=4,
    )  # fmt: skip
