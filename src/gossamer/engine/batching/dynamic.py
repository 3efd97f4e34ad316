"""Dynamic batching: a step holds as much as a goal for the time between tokens lets it.

What a step will take is predicted from the steps before it (`StepTimes`), as in "SARATHI-Serve" (2024) whose
token budget is fixed offline for a goal; what prediction cannot know, such as noise and the time outside of
the program, is learned from the gaps that came of it, by tracking their 95th percentile.
"""

from __future__ import annotations

from gossamer.config import DynamicBatching
from gossamer.engine.batching.budget import Budget, FixedBudget
from gossamer.engine.state import State

__all__ = ["GoalBudget", "WaitBudget", "budget_of"]

_TAIL = 0.05  # of the gaps may exceed the goal
_RATE = 0.04  # of the tracking, in the logarithm of the aim; a gap beyond the goal counts (1 - _TAIL) of it
_AIM = (0.3, 1.5)  # times the goal: how far tracking may lead
_FREE = 1.1  # times a lone decode: what more decodes may take where even that one is beyond the goal
_AHEAD = 64  # tokens that contexts grow before a sequence admitted now can be said to have settled
_SHARE = 0.95  # of the aim that decodes alone may take when another sequence is let in
_SURE = 20  # steps with decodes before the goal is called unreachable


class GoalBudget:
    """Holds the 95th percentile of the gaps between tokens at a goal, in seconds, within the executor's
    limits. With nobody decoding there is no gap to hold, and prefill takes all of a step.

    aim: seconds that a step may take as predicted now. unreachable: seconds of a lone decode where that is
    more than the goal; else None.
    """

    __slots__ = ("_decodes", "_factor", "_keys", "_now", "_steps", "_typical", "aim", "goal", "unreachable")

    def __init__(self, goal: float) -> None:
        self.goal = goal
        self.aim = goal
        self.unreachable: float | None = None
        self._factor = 1.0  # of the goal, by which steps aim
        self._decodes = self._keys = 0
        self._steps, self._typical = 0, 1.0
        self._now = 0.0

    def tokens(self, state: State) -> int:
        """As many as are predicted to take no longer than the aim."""
        limits = state.limits
        before, self._decodes, self._keys, start = self._decodes, 0, 0, 0
        for seq in state.running:
            if seq.computed >= seq.length - 1:
                self._decodes += 1
                self._keys += seq.length
            elif not start:
                start = seq.computed
        self._track(min(before, self._decodes), state.now - self._now)
        self._now = state.now
        if not self._decodes:
            return limits.max_tokens
        self._set_aim(state)
        least, most = 0, limits.max_tokens - self._decodes
        while least < most:  # the most prompt tokens that fit
            middle = (least + most + 1) // 2
            if self._predict(state, middle, start) <= self.aim:
                least = middle
            else:
                most = middle - 1
        return self._decodes + least

    def sequences(self, state: State) -> int:
        """As many as could decode together within the aim, their contexts grown by what is to come; one at
        least."""
        running = state.running
        if not running:
            return state.max_num_seqs
        context = sum(min(seq.limit, seq.length + _AHEAD) for seq in running) // len(running)
        least, most = 1, state.max_num_seqs
        while least < most:
            middle = (least + most + 1) // 2
            predicted = state.times.predict(middle, middle * context)
            if predicted is None or predicted <= _SHARE * self.aim:
                least = middle
            else:
                most = middle - 1
        return least

    def admits(self, state: State) -> bool:
        """Always: the two above say how many."""
        return True

    def _predict(self, state: State, prompt: int, start: int) -> float:
        """Seconds of the decodes together with so many tokens of a prompt, of which `start` are computed."""
        pairs = prompt * start + prompt * (prompt + 1) // 2
        predicted = state.times.predict(
            self._decodes + prompt,
            self._keys + (start + prompt if prompt else 0),
            rows=self._decodes,
            pairs=self._keys + pairs,
        )
        return predicted or 0.0

    def _track(self, gaps: int, seconds: float) -> None:
        """So many sequences waited so long for their next token: moves the aim until _TAIL of the gaps
        exceed the goal."""
        if not gaps:
            return
        self._typical += (gaps - self._typical) / 32
        excess = (seconds > self.goal) - _TAIL
        factor = self._factor * (1 - _RATE * excess * min(gaps / self._typical, 2.0))
        self._factor = min(max(factor, _AIM[0]), _AIM[1])

    def _set_aim(self, state: State) -> None:
        self.aim = self.goal * self._factor
        self._steps += 1
        alone = state.times.predict(1, self._keys // self._decodes)
        if alone is not None and self._steps >= _SURE:
            self.unreachable = alone if alone > self.goal else None
            self.aim = max(self.aim, _FREE * alone)


class WaitBudget:
    """Another budget, with newcomers let in together: once they fill the free places, or the first of them
    has waited so many seconds."""

    __slots__ = ("_inner", "_seconds")

    def __init__(self, inner: Budget, seconds: float) -> None:
        self._inner = inner
        self._seconds = seconds

    @property
    def unreachable(self) -> float | None:
        """As the other."""
        return self._inner.unreachable

    def tokens(self, state: State) -> int:
        """As the other."""
        return self._inner.tokens(state)

    def sequences(self, state: State) -> int:
        """As the other."""
        return self._inner.sequences(state)

    def admits(self, state: State) -> bool:
        """Whether the window is over."""
        waiting = state.waiting
        if not waiting or not self._inner.admits(state):
            return False
        if state.now - waiting.first().live.times["arrival"] >= self._seconds:
            return True
        return len(waiting) >= self._inner.sequences(state) - len(state.running)


def budget_of(dynamic: DynamicBatching | None) -> Budget:
    """The budget that a config asks for."""
    budget: Budget = FixedBudget()
    if dynamic is not None and dynamic.itl_goal_ms is not None:
        budget = GoalBudget(dynamic.itl_goal_ms / 1e3)
    if dynamic is not None and dynamic.max_wait_ms is not None:
        budget = WaitBudget(budget, dynamic.max_wait_ms / 1e3)
    return budget
