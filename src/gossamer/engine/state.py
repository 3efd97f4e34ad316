"""What a batching policy works on: who waits, who runs, which pages are left; and the moves between."""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heapify, heappop, heappush

from gossamer.engine.pages import IntegrityError, KVPages
from gossamer.engine.sequence import Phase, Sequence
from gossamer.engine.step import ExecutorLimits

__all__ = ["State", "Waiting"]

Rank = tuple[int, int, int]


def _rank(seq: Sequence) -> Rank:
    return seq.rank


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


class State:
    """running is sorted by rank: the first goes before all others, the last gives way first.

    sequences: all that wait or run, by id. now: time of the step's start in seconds. preemptions: how many
    there have been.
    """

    __slots__ = ("kv", "limits", "max_num_seqs", "now", "preemptions", "running", "sequences", "waiting")

    def __init__(self, limits: ExecutorLimits, max_num_seqs: int) -> None:
        self.limits = limits
        self.max_num_seqs = max_num_seqs
        self.kv = KVPages(limits.page_size, limits.pages)
        self.running: list[Sequence] = []
        self.waiting = Waiting()
        self.sequences: dict[int, Sequence] = {}
        self.preemptions = 0
        self.now = 0.0

    def enqueue(self, seq: Sequence) -> None:
        """Takes a new sequence in."""
        self.sequences[seq.id] = seq
        self.waiting.push(seq)

    def start(self, seq: Sequence, slots: int) -> None:
        """Lets a sequence that left the queue run, with pages for so many slots.

        Raises IntegrityError where they are not free: policies look first.
        """
        if not self.grow(seq, slots):
            raise IntegrityError(
                f"sequence {seq.id} starts with {slots} slots, {self.kv.free} pages are free"
            )
        seq.phase = Phase.RUNNING
        seq.live.times.setdefault("first_scheduled", self.now)
        insort(self.running, seq, key=_rank)

    def grow(self, seq: Sequence, slots: int) -> bool:
        """Makes sure of pages for so many slots; False, with nothing changed, where there are too few."""
        if slots <= seq.capacity:
            return True
        if not self.kv.extend(seq.tables, slots):
            return False
        seq.capacity = min(self.kv.pages(slots) * self.kv.page_size, self.limits.max_model_len)
        return True

    def preempt(self) -> Sequence:
        """Sends the last of those running back into the queue, its pages freed, its tokens kept: when it
        runs again they are prefilled anew. Returns it."""
        seq = self.running.pop()
        self._free(seq)
        self.waiting.push(seq)
        self.preemptions += 1
        return seq

    def release(self, seq: Sequence) -> None:
        """Takes a sequence out for good, wherever it is."""
        self.sequences.pop(seq.id, None)
        if seq.phase is Phase.WAITING:
            self.waiting.discard(seq)
        elif seq.phase is Phase.RUNNING:
            del self.running[bisect_left(self.running, seq.rank, key=_rank)]
            self._free(seq)
            seq.phase = Phase.DONE

    def _free(self, seq: Sequence) -> None:
        self.kv.release(seq.tables)
        seq.capacity = 0
        seq.computed = 0

    def check(self) -> None:
        """Raises IntegrityError for a page leaked or held twice, a table too short, or a broken queue."""
        self.kv.check([seq.tables for seq in self.running])
        if len(self.running) > self.max_num_seqs:
            raise IntegrityError(f"{len(self.running)} sequences run, {self.max_num_seqs} may")
        if any(a.rank >= b.rank for a, b in zip(self.running, self.running[1:])):
            raise IntegrityError("running sequences are out of order")
        for seq in self.running:
            held = min(len(table) for table in seq.tables) * self.kv.page_size
            if seq.phase is not Phase.RUNNING or not seq.computed <= seq.capacity <= held:
                raise IntegrityError(
                    f"sequence {seq.id} ({seq.phase.name}) has computed {seq.computed} tokens, a capacity of "
                    f"{seq.capacity} and pages for {held}"
                )
            if seq.length != len(seq.prompt_ids) + len(seq.output_ids) or seq.computed >= seq.length:
                raise IntegrityError(f"sequence {seq.id} counts {seq.length} tokens, {seq.computed} computed")
        waiting = self.waiting.sequences()
        if len(waiting) != len(self.waiting) or any(seq.computed or seq.capacity for seq in waiting):
            raise IntegrityError("the queue holds sequences that do not wait")
        if {seq.id for seq in self.running + waiting} != set(self.sequences):
            raise IntegrityError("sequences that neither wait nor run are kept")
