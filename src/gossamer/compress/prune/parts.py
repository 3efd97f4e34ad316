"""Which heads and MLP channels of a block stay, and what the matrices that read them take over from those
that go. Axes: N outputs, K inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from gossamer.compress.blocks import BlockAt
from gossamer.compress.hessian import collect, damped
from gossamer.compress.prune.axes import Kept, value_kinds
from gossamer.compress.prune.importance import groups, output_power
from gossamer.compress.prune.shape import Counts, counts_of

__all__ = ["choose_parts", "largest", "taken_over"]

_DAMPING = 0.01


def choose_parts(block: BlockAt, left: Counts, given: Mapping[str, torch.Tensor]) -> Kept:
    """What stays of a block's heads and channels; changes the matrices that read them, in place.

    given: importance of the inputs of matrices by name [K] or [E, K]; where it lacks one, a part counts by
    the mean square of what it gives to the outputs.
    """
    graph = block.walk.graph
    old, kinds = counts_of(graph), value_kinds(graph)
    readers = {n.outputs[0] + ".gated": n for n in block.block.nodes if n.op == "experts"}
    kept: dict[str, npt.NDArray[np.int64]] = {}
    planes: list[npt.NDArray[np.int64]] = []
    for value in dict.fromkeys(site.value for site in block.sites()):
        kind = "ffn" if value in readers else kinds[value]
        if kind not in ("heads", "ffn"):
            continue
        size = old.head_dim * (old.heads // old.kv_heads) if kind == "heads" else 1
        for site, hessian in collect(block, value).items():
            (name,) = site.matrices
            matrix = block.matrix(name, site.plane)
            count = left.kv_heads if kind == "heads" else left.ffn if site.plane is None else left.expert_ffn
            moments = hessian.mean() if hessian.tokens else torch.eye(matrix.shape[1])
            if name in given:
                importance = groups(given[name] if site.plane is None else given[name][site.plane], size)
            else:
                importance = output_power(matrix, moments, size)
            stays = largest(importance, count)
            columns = (stays[:, None] * size + np.arange(size)).ravel()
            if len(columns) < matrix.shape[1]:
                matrix[:, torch.from_numpy(columns)] = taken_over(matrix, moments, columns)
            if kind == "heads":
                per = old.head_dim
                kept |= {"heads": columns, "kv": (stays[:, None] * per + np.arange(per)).ravel()}
            elif site.plane is None:
                kept["ffn"] = columns
            else:
                planes.append(columns)
    return kept | ({"ffn": np.stack(planes)} if planes else {})


def largest(importance_K: torch.Tensor, count: int) -> npt.NDArray[np.int64]:
    """Indices of the `count` largest, ascending; of equals the first."""
    order = importance_K.argsort(descending=True, stable=True)
    return np.sort(order[:count].numpy())


def taken_over(
    weight_NK: torch.Tensor, hessian_KK: torch.Tensor, columns: npt.NDArray[np.int64]
) -> torch.Tensor:
    """The weights of the columns that stay [N, columns] for which the outputs change least, in the mean
    square over tokens. hessian: the mean of x x^T of all inputs."""
    stays = torch.from_numpy(columns)
    moments = damped(hessian_KK, _DAMPING)[stays]
    solved: torch.Tensor = torch.linalg.solve(moments[:, stays].double(), (moments @ weight_NK.T).double())
    return solved.T.float()
