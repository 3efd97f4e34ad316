"""The queue, and who is next in it: priorities that age, tenants that share, first come first served."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from gossamer.engine.request import Request
from gossamer.engine.sequence import Phase, Rank, Sequence

__all__ = ["Turns", "Waiting"]

_EXPECTED = 128  # tokens of an output, before any has ended
_REMEMBERED = 4096  # tenants


class Waiting:
    """The queue, lowest rank first. Every operation costs at most the logarithm of its length."""

    __slots__ = ("_dead", "_heap")

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Sequence]] = []
        self._dead = 0  # entries whose sequence was aborted; dropped when met, or when they are the most

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def push(self, seq: Sequence) -> None:
        """Puts a sequence at its rank's place."""
        seq.phase = Phase.WAITING
        heappush(self._heap, (seq.rank, seq))

    def first(self) -> Sequence:
        """Who is next; stays in line. Raises IndexError when nobody waits."""
        while self._heap[0][1].phase is Phase.DONE:
            heappop(self._heap)
            self._dead -= 1
        return self._heap[0][1]

    def pop(self) -> Sequence:
        """Takes out who is next. Raises IndexError when nobody waits."""
        self.first()
        return heappop(self._heap)[1]

    def discard(self, seq: Sequence) -> None:
        """Drops a waiting sequence for good (its phase becomes DONE)."""
        seq.phase = Phase.DONE
        self._dead += 1
        if self._dead * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1].phase is not Phase.DONE]
            heapify(self._heap)
            self._dead = 0

    def sequences(self) -> list[Sequence]:
        """All who wait, in no order."""
        return [seq for _, seq in self._heap if seq.phase is not Phase.DONE]


class Turns:
    """Where in line a request stands, as a number that never changes, in tokens of service.

    A tenant's requests follow each other at a distance of their cost, beginning at where the line is now, so
    that tenants with work advance alike whatever they queue (start-time fair queueing, Goyal, Vin and Cheng
    1996; tokens as the measure after "Fairness in Serving Large Language Models", 2024). A priority moves a
    request by `ageing` tokens, hence it waits for no more than that of later ones: it ages.
    """

    __slots__ = ("_ageing", "_finish", "_now", "_output")

    def __init__(self, ageing: int) -> None:
        self._ageing = ageing
        self._now = 0.0  # the start of the newest to be admitted, or the end of what has been served
        self._finish: dict[str, float] = {}
        self._output = float(_EXPECTED)

    def take(self, request: Request, most: int) -> float:
        """The place of a new request whose outputs may have `most` tokens each."""
        start = max(self._now, self._finish.get(request.tenant, 0.0))
        cost = len(request.prompt_ids) + request.params.n * min(most, self._output)
        if len(self._finish) >= _REMEMBERED:
            self._forget()
        self._finish[request.tenant] = start + cost
        return start + request.priority * self._ageing

    def admitted(self, request: Request, place: float) -> None:
        """It is no more in line."""
        self._now = max(self._now, place - request.priority * self._ageing)

    def ended(self, request: Request, place: float, tokens: int) -> None:
        """An output had so many tokens: what to expect of others, and service that the line has moved by.
        Where every tenant comes but once, nothing else moves it, and no priority would age."""
        if tokens:
            served = len(request.prompt_ids) + min(tokens, self._output)
            self.admitted(request, place + served)
        self._output += (tokens - self._output) / 16

    def _forget(self) -> None:
        """Drops the tenants that the line has passed; half of all at least, for which it moves on."""
        ends = sorted(self._finish.values())
        self._now = max(self._now, ends[len(ends) // 2])
        self._finish = {name: end for name, end in self._finish.items() if end > self._now}
