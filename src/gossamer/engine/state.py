"""What a batching policy works on: who waits, who runs, which pages are left; and the moves between."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort

from gossamer.engine.pages import RELEASED, IntegrityError, KVPages, PagePool
from gossamer.engine.prefix_cache import Hit, Prefixes, PrefixIndex
from gossamer.engine.sequence import Phase, Rank, Sequence
from gossamer.engine.step import ExecutorLimits, KVOp, StepPlan
from gossamer.engine.step_times import StepTimes
from gossamer.engine.waiting import Turns, Waiting

__all__ = ["State"]


def _rank(seq: Sequence) -> Rank:
    return seq.rank


class State:
    """running is sorted by rank: the first goes before all others, the last gives way first.

    sequences: all that wait or run, by id. turns: who goes first. now: time of the step's start in seconds.
    kv_ops: moves for the next plan, in order; moving: sequences whose pages are right once they are done.
    shares: whether pages may be shared; prefix: what is known of them, None where they may not.
    preempt_by: "recompute", "swap" or "auto", the cheaper as `times`, what steps cost, says. preemptions,
    swaps: how many there have been; a swap is a preemption that kept its pages. gave_way: those preempted
    since the engine last looked. slower: the slots of the slower tier. ahead: whether a step is planned while
    the one before it is in flight, whose outcome the sequences assume.
    """

    __slots__ = (
        "ahead",
        "gave_way",
        "kv",
        "kv_ops",
        "limits",
        "max_num_seqs",
        "moving",
        "now",
        "preempt_by",
        "preemptions",
        "prefix",
        "running",
        "sequences",
        "shares",
        "slower",
        "swaps",
        "times",
        "turns",
        "waiting",
    )

    def __init__(
        self,
        limits: ExecutorLimits,
        max_num_seqs: int,
        *,
        shares: bool = False,
        ageing: int = 0,
        preempt_by: str = "recompute",
    ) -> None:
        self.limits = limits
        self.max_num_seqs = max_num_seqs
        self.kv = KVPages(limits.page_size, limits.pages, limits.windows)
        self.shares = shares
        self.prefix = PrefixIndex(self.kv) if shares else None
        self.turns = Turns(ageing)
        self.slower = tuple(PagePool(size) for size in limits.swap_pages)
        self.preempt_by = preempt_by
        self.times = StepTimes()
        self.kv_ops: list[KVOp] = []
        self.moving: set[int] = set()
        self.running: list[Sequence] = []
        self.waiting = Waiting()
        self.sequences: dict[int, Sequence] = {}
        self.preemptions = self.swaps = 0
        self.gave_way: list[Sequence] = []
        self.ahead = False
        self.now = 0.0

    # -- in and out ---------------------------------------------------------------------------------

    def enqueue(self, seq: Sequence) -> None:
        """Takes a new sequence in."""
        self.sequences[seq.id] = seq
        self.waiting.push(seq)

    def start(self, seq: Sequence, slots: int, hit: Hit | None = None) -> None:
        """Lets a sequence that left the queue run, with pages for so many slots; what it has on the slower
        tier, or else the hit, need not be computed.

        Raises IntegrityError where pages are not free: policies look first.
        """
        if self.prefix is not None and seq.prefixes is not None and not seq.output_ids:
            self.prefix.queries += seq.length
            self.prefix.hits += 0 if hit is None else hit.tokens
        tail: list[int] = []
        if hit is not None and not seq.swapped:
            self._share(seq, hit)
            tail = [] if hit.tail is None else list(hit.tail.pages)  # growing may evict it
            if seq.index == 0 and not seq.output_ids:
                seq.live.cached = hit.tokens
        if not self.grow(seq, slots):
            raise IntegrityError(
                f"sequence {seq.id} starts with {slots} slots, {self.kv.free} pages are free"
            )
        if seq.swapped:
            self._swap_in(seq)
        elif hit is not None and tail:
            self._copy(seq, tail, len(hit.blocks), hit.rest)
        self._expect_block(seq)
        seq.phase = Phase.RUNNING
        seq.live.times.setdefault("first_scheduled", self.now)
        self.turns.admitted(seq.live.request, seq.rank[0])
        insort(self.running, seq, key=_rank)

    def _share(self, seq: Sequence, hit: Hit) -> None:
        assert self.prefix is not None
        self.prefix.use(hit, seq.tables)
        seq.published = len(hit.blocks)
        seq.computed = hit.tokens
        seq.capacity = len(hit.blocks) * self.kv.page_size

    def _copy(self, seq: Sequence, sources: list[int], block: int, tokens: int) -> None:
        """Copies the beginning of a block, whose pages hold what they did until the step computes."""
        for group, (source, table) in enumerate(zip(sources, seq.tables)):
            if source != table[block]:  # else it was evicted for this very sequence
                self.kv_ops.append(KVOp("copy", group, source, table[block], tokens))
                self.moving.add(seq.id)

    def grow(self, seq: Sequence, slots: int) -> bool:
        """Makes sure of pages for so many slots; False, with nothing changed, where there are too few."""
        if slots <= seq.capacity:
            return True
        if not self.kv.extend(seq.tables, slots):
            return False
        seq.capacity = min(self.kv.pages(slots) * self.kv.page_size, self.limits.max_model_len)
        return True

    @property
    def can_grow(self) -> bool:
        """Whether every sequence that decodes has its page, so that none must give way."""
        free, running = self.kv.free, self.running
        return free >= len(running) or free >= sum(
            seq.length > seq.capacity and seq.computed >= seq.length - 1 for seq in running
        )

    def preempt(self) -> Sequence:
        """Sends the last of those running back into the queue, its pages freed, its tokens kept: when it
        runs again its pages come back from the slower tier, or are computed anew. Returns it.

        Raises IntegrityError where a step is in flight, which may yet write into these pages."""
        if self.ahead:
            raise IntegrityError("a sequence is to give way before the step in flight is known")
        seq = self.running.pop()
        if self._swap_pays(seq):
            self._swap_out(seq)
        self._free(seq)
        self.waiting.push(seq)
        self.preemptions += 1
        self.gave_way.append(seq)
        return seq

    def release(self, seq: Sequence) -> None:
        """Takes a sequence out for good, wherever it is."""
        self.sequences.pop(seq.id, None)
        self.forget_swapped(seq)
        if seq.phase is Phase.WAITING:
            self.waiting.discard(seq)
        elif seq.phase is Phase.RUNNING:
            del self.running[bisect_left(self.running, seq.rank, key=_rank)]
            self._free(seq)
            seq.phase = Phase.DONE

    def _free(self, seq: Sequence) -> None:
        if self.prefix is not None and seq.prefixes is not None:
            self._publish_rest(seq)
        self.kv.release(seq.tables)
        seq.capacity = 0
        seq.computed = 0
        seq.published = 0
        seq.draft = None

    # -- the slower tier ------------------------------------------------------------------------------

    def _swap_pays(self, seq: Sequence) -> bool:
        if self.preempt_by == "recompute" or not self.slower or not seq.computed:
            return False
        pages = self.kv.pages(seq.computed)
        if any(pool.available < pages for pool in self.slower):
            return False
        return self.preempt_by == "swap" or self.times.swap_seconds(2 * pages) < self.times.prefill_seconds(
            seq.computed
        )

    def _swap_out(self, seq: Sequence) -> None:
        size = self.kv.page_size
        seq.saved = seq.computed
        seq.swapped = tuple(array("i") for _ in seq.tables)
        for group, (table, slots, pool) in enumerate(zip(seq.tables, seq.swapped, self.slower)):
            for page in table[: self.kv.pages(seq.computed)]:
                if page == RELEASED:
                    slots.append(RELEASED)
                    continue
                slots.append(pool.allocate())
                self.kv_ops.append(KVOp("out", group, page, slots[-1], size))
        self.moving.add(seq.id)
        self.swaps += 1

    def _swap_in(self, seq: Sequence) -> None:
        """Its pages are there already, with nothing in them."""
        size = self.kv.page_size
        for group, (table, slots) in enumerate(zip(seq.tables, seq.swapped)):
            for page, slot in zip(table, slots):
                if slot != RELEASED:
                    self.kv_ops.append(KVOp("in", group, slot, page, size))
        seq.computed = seq.saved
        self.moving.add(seq.id)
        self.forget_swapped(seq)
        if self.kv.windowed:
            self.kv.trim(seq.tables, seq.computed)

    def forget_swapped(self, seq: Sequence) -> None:
        """Gives up what a sequence has on the slower tier."""
        for pool, slots in zip(self.slower, seq.swapped):
            for slot in slots:
                if slot != RELEASED:
                    pool.release(slot)
        seq.swapped, seq.saved = (), 0

    # -- what is known ----------------------------------------------------------------------------------

    def find(self, seq: Sequence) -> Hit | None:
        """What need not be computed of a sequence that waits; its last token always is."""
        if self.prefix is None or seq.prefixes is None or seq.swapped or seq.unscored:
            return None
        hit = self.prefix.find(seq.prefixes, seq.history(), seq.length - 1)
        return hit if hit.tokens else None

    def prefixes(self, salt: str) -> Prefixes:
        """Of a new sequence."""
        assert self.prefix is not None
        return self.prefix.prefixes(salt)

    def wanted(self, hit: Hit | None, slots: int) -> int:
        """Pages that must be available for so many slots after a hit, in the group that has the fewest."""
        pages = self.kv.pages(slots)
        if hit is None:
            return pages
        most = pages - len(hit.blocks)
        idle = max(
            sum(pool.counts[block.pages[g]] == 0 for block in hit.blocks if block.pages[g] >= 0)
            for g, pool in enumerate(self.kv.pools)
        )
        return most + idle

    def publish(self, seq: Sequence) -> None:
        """Makes the full pages of a sequence known, and the end of its prompt."""
        assert self.prefix is not None and seq.prefixes is not None
        size, computed = self.kv.page_size, seq.computed
        while (seq.published + 1) * size <= computed:
            start = seq.published * size
            self.prefix.publish(seq.prefixes, seq.tables, seq.published, seq.tokens(start, start + size))
            seq.published += 1
        if computed == len(seq.prompt_ids):
            self._publish_rest(seq)
        self._expect_block(seq)

    def _expect_block(self, seq: Sequence) -> None:
        """Says when there is more to make known: at the next full page, or at the prompt's end."""
        if seq.prefixes is not None:
            full, prompt = (seq.published + 1) * self.kv.page_size, len(seq.prompt_ids)
            seq.next_block = prompt if seq.computed < prompt < full else full

    def _publish_rest(self, seq: Sequence) -> None:
        """Makes the last page known, full or not, of a sequence whose tokens are all published up to it."""
        assert self.prefix is not None and seq.prefixes is not None
        size = self.kv.page_size
        start = seq.published * size
        if start < seq.computed:
            tokens = seq.tokens(start, min(seq.computed, start + size))
            self.prefix.publish(seq.prefixes, seq.tables, seq.published, tokens)

    # -- integrity -------------------------------------------------------------------------------------

    def check(self, flights: list[StepPlan]) -> None:
        """Raises IntegrityError for a page leaked, shared without a count or written while shared, a table
        too short, or a broken queue. flights: steps that are not collected."""
        self.kv.check([seq.tables for seq in self.running])
        if self.prefix is not None:
            self.prefix.check()
        if len(self.running) > self.max_num_seqs:
            raise IntegrityError(f"{len(self.running)} sequences run, {self.max_num_seqs} may")
        if any(a.rank >= b.rank for a, b in zip(self.running, self.running[1:])):
            raise IntegrityError("running sequences are out of order")
        for seq in self.running:
            self._check_running(seq)
        self._check_flights(flights)
        waiting = self.waiting.sequences()
        if len(waiting) != len(self.waiting) or any(seq.computed or seq.capacity for seq in waiting):
            raise IntegrityError("the queue holds sequences that do not wait")
        if {seq.id for seq in self.running + waiting} != set(self.sequences):
            raise IntegrityError("sequences that neither wait nor run are kept")
        for group, pool in enumerate(self.slower):
            pool.check(slot for seq in waiting for slots in seq.swapped[group : group + 1] for slot in slots)

    def _check_flights(self, flights: list[StepPlan]) -> None:
        if len(flights) > 1 or self.ahead or any(seq.sampling.pending for seq in self.sequences.values()):
            raise IntegrityError(f"{len(flights)} steps are in flight, and what they bring is assumed")
        for span in flights[0].spans if flights else ():
            seq = self.sequences.get(span.sequence)
            if seq is None:  # ended since
                continue
            stop = span.start + len(span.tokens)
            if seq.phase is not Phase.RUNNING or seq.computed != span.start or stop > seq.capacity:
                raise IntegrityError(
                    f"sequence {seq.id} ({seq.phase.name}) is at {seq.computed} of {seq.capacity} slots, and "
                    f"the step in flight goes from {span.start} to {stop}"
                )

    def _check_running(self, seq: Sequence) -> None:
        held = min(len(table) for table in seq.tables) * self.kv.page_size
        if seq.phase is not Phase.RUNNING or not seq.computed <= seq.capacity <= held or seq.swapped:
            raise IntegrityError(
                f"sequence {seq.id} ({seq.phase.name}) has computed {seq.computed} tokens, a capacity of "
                f"{seq.capacity} and pages for {held}"
            )
        if seq.length != len(seq.prompt_ids) + len(seq.output_ids) or seq.computed >= seq.length:
            raise IntegrityError(f"sequence {seq.id} counts {seq.length} tokens, {seq.computed} computed")
        first = seq.computed // self.kv.page_size
        for group, (table, pool) in enumerate(zip(seq.tables, self.kv.pools)):
            if any(page == RELEASED or pool.counts[page] != 1 for page in table[first:]):
                raise IntegrityError(f"sequence {seq.id} is to write pages of group {group} that it shares")
            window = self.kv.windows[group]
            seen = 0 if window is None else max(0, (seq.computed - window + 1) // self.kv.page_size)
            if RELEASED in table[seen:]:
                raise IntegrityError(f"sequence {seq.id} sees a page of group {group} that was given back")
