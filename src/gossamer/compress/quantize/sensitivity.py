"""What it costs the model when some of its matrices alone are stored in fewer bits: KL divergence of the
logits on calibration text, through everything that follows the change.

Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from gossamer.backends.reference import ReferenceModel
from gossamer.checkpoint.weights import WeightSource
from gossamer.compress.blocks import BlockAt, Blocks
from gossamer.graph.ir import Graph, Node
from gossamer.graph.ops.attention import KVState, SpanRows
from gossamer.graph.part import part

__all__ = ["Sensitivity", "divergence"]

_LOGITS = 1 << 24  # elements of logits at a time
_KEPT = 1 << 26  # elements of logits that are not computed again


class Sensitivity:
    """A whole model in float32 whose weights may be changed, and what that does to its logits.

    for block, loss in sensitivity:
        weight = sensitivity.model.weight(...)
        ...                     # change it, ask loss(), and put back what was there

    block: the one that holds what is changed, with its inputs; None at the end, for embedding and head.
    Everything before a block is computed once, everything behind it at every question.
    """

    def __init__(self, graph: Graph, source: WeightSource, windows_BL: npt.NDArray[np.int32]) -> None:
        self.walk = Blocks(graph, source, windows_BL)
        self.model = ReferenceModel.load(graph, source).requires_grad_(False)
        last = max(i for i, node in enumerate(graph.nodes) if node.scope)
        self._body, self._end = graph.nodes[: last + 1], graph.nodes[last + 1 :]
        made = {out for node in self._body for out in node.outputs}
        (self._hidden,) = {v for node in self._end for v in node.inputs if v in made}
        self._rows = max(1, _LOGITS // graph.vocab)
        self._head = self._shared(self._end, "logits")
        clean = part(graph, self._end, {"logits": graph.outputs["logits"]})
        self._clean_head = ReferenceModel.load(clean, source).requires_grad_(False)

    _clean: torch.Tensor
    _kept: dict[int, torch.Tensor]

    def __len__(self) -> int:
        return len(self.walk) + 1

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[BlockAt | None, Callable[[], float]]]:
        whole = self._shared(self._body, self._hidden)
        wanted = (self._hidden,)

        def from_ids(rows: slice) -> torch.Tensor:
            return self.walk.run(whole, {}, rows, wanted)[self._hidden]

        self._clean, self._kept = torch.cat([from_ids(rows) for rows in self.walk.chunks()]), {}
        for block in self.walk:
            first = self._body.index(block.block.nodes[0])
            behind = self._shared(self._body[first:], self._hidden)

            def from_block(
                rows: slice, block: BlockAt = block, behind: ReferenceModel = behind
            ) -> torch.Tensor:
                return block.onward(behind, rows, wanted)[self._hidden]

            yield block, lambda from_block=from_block: self._loss(from_block)  # type: ignore[misc]
        yield None, lambda: self._loss(from_ids)

    def _loss(self, hidden: Callable[[slice], torch.Tensor]) -> float:
        """Mean KL divergence of all tokens, in nats."""
        total = 0.0
        for chunk in self.walk.chunks():
            after = hidden(chunk)
            for start in range(0, len(after), self._rows):
                other = self._logits(self._head, after[start : start + self._rows])
                total += float(divergence(self._reference(chunk.start + start, len(other)), other).sum())
        return total / float(self.walk.batch * self.walk.length)

    def _reference(self, start: int, count: int) -> torch.Tensor:
        """Logits of the model as it was; kept where that takes little memory."""
        if start not in self._kept:
            logits = self._logits(self._clean_head, self._clean[start : start + count])
            if len(self._clean) * self.walk.graph.vocab > _KEPT:
                return logits
            self._kept[start] = logits
        return self._kept[start]

    def _logits(self, head: ReferenceModel, hidden: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(hidden))
        state = KVState((SpanRows(0, 0, len(hidden), 0),))
        logits: torch.Tensor = head(rows, rows, rows, state, ("logits",), {self._hidden: hidden})["logits"]
        return logits

    def _shared(self, nodes: Sequence[Node], output: str) -> ReferenceModel:
        """A part of the model over the very same weights."""
        graph = self.walk.graph
        shared = ReferenceModel(part(graph, nodes, {output: graph.outputs.get(output, output)}))
        mine = {
            name: weight for name, weight in self.model.named_parameters() if name in shared.graph.weights
        }
        shared.load_state_dict(mine, assign=True)
        return shared.requires_grad_(False)


def divergence(reference_TV: torch.Tensor, other_TV: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) of each token [T], in nats; both are logits."""
    p, q = reference_TV.log_softmax(-1), other_TV.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
