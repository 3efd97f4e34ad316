"""What steps of the target cost, learned from those that ran."""

from __future__ import annotations

__all__ = ["StepTimes"]

_EDGES = (1, 2, 4, 8, 16, 32, 64, 256, 1024)  # tokens: where the cost of one more may change
_SLOPES = len(_EDGES)
_ROWS, _KEYS, _PAIRS = _SLOPES + 1, _SLOPES + 2, _SLOPES + 3
_SIZE = _SLOPES + 4
_MEMORY = 0.98  # of a range of sizes, from one of its steps to its next
_LONG = 25  # steps of a range before it forgets any
_KNOWN = 6  # steps that make a range known
_LIKE = 1e-3  # how much neighbouring slopes pull each other
_SWEEPS, _EVERY = 24, 32  # of a fit; steps between fits
_FAST = 0.15  # of a change of the machine's speed is believed at a step
_FAR = 1.5  # times off: no step is believed to be farther


class StepTimes:
    """Seconds of a step = speed * (fixed + slopes over ranges of its tokens + rows + keys + pairs, each at a
    price of its own), where no price is negative: flat while memory bounds it, linear later, or otherwise.

    The prices are least squares of the relative error over the newest steps of every range of sizes, so that
    a thousand decodes do not wash out what is known of a prefill; a range never seen takes its neighbours'.
    The speed follows the machine within some twenty steps, and no single step moves it far.
    """

    __slots__ = ("_filled", "_fit_at", "_known", "_page", "_prices", "_seen", "_speed", "_sums", "_weights")

    def __init__(self) -> None:
        self._prices = [0.0] * _SIZE
        self._speed = 1.0
        # Per range: products of features, their products with the seconds; the weight of the next step; how
        # many steps there were, up to _LONG.
        self._sums = [[0.0] * (_SIZE * _SIZE) for _ in range(_SLOPES)]
        self._known = [[0.0] * _SIZE for _ in range(_SLOPES)]
        self._weights = [1.0] * _SLOPES
        self._filled = [0] * _SLOPES
        self._seen, self._fit_at = 0, 1
        self._page = 0.0

    def observe(
        self,
        tokens: int,
        kv_tokens: int,
        seconds: float,
        *,
        rows: int | None = None,
        pairs: int | None = None,
    ) -> None:
        """A step took so long.

        tokens: computed; kv_tokens: sum over spans of the keys they read (start + tokens); rows: sampled;
        pairs: sum over tokens of the keys they read. Left out, every token is a decode's: sampled, and
        alone in its span.
        """
        if tokens < 1 or not seconds > 0:
            return
        part, features = _features(tokens, kv_tokens, rows, pairs)
        if self._filled[part] > _KNOWN:
            cost = self._cost(features)
            ratio = min(max(seconds / (cost * self._speed), 1 / _FAR), _FAR)
            seconds = ratio * cost * self._speed
            self._speed *= 1 + _FAST * (ratio - 1)
        self._remember(part, features, seconds / self._speed)
        self._seen += 1
        if self._seen >= self._fit_at:
            self._fit()
            self._fit_at = self._seen + min(self._seen, _EVERY)

    def predict(
        self, tokens: int, kv_tokens: int = 0, *, rows: int | None = None, pairs: int | None = None
    ) -> float | None:
        """Seconds of such a step (arguments as of `observe`); None before any was seen."""
        if not self._seen:
            return None
        return self._cost(_features(tokens, kv_tokens, rows, pairs)[1]) * self._speed

    def prefill_seconds(self, tokens: int) -> float:
        """What computing so many tokens of one sequence adds to steps that run anyhow; 0 before any step was
        seen."""
        if tokens < 1 or not self._seen:
            return 0.0
        features = _features(tokens, tokens, 0, tokens * (tokens + 1) // 2)[1]
        return (self._cost(features) - self._prices[0]) * self._speed

    def observe_swap(self, pages: int, seconds: float) -> None:
        """Moving so many pages to or from the slower tier took so long."""
        if pages > 0 and seconds >= 0:
            page = seconds / pages
            self._page += (min(page, 4 * self._page) - self._page) / 8 if self._page else page

    def swap_seconds(self, pages: int) -> float:
        """What moving so many pages costs; 0 before any was moved, so that it is tried once."""
        return pages * self._page

    def _cost(self, features: list[tuple[int, float]]) -> float:
        prices = self._prices
        total = 0.0
        for i, value in features:
            total += value * prices[i]
        return total or 1e-9

    def _remember(self, part: int, features: list[tuple[int, float]], seconds: float) -> None:
        """Adds a step to its range, weighted so that relative errors count. Newer steps weigh more instead of
        older ones less, which would touch every sum."""
        sums, known, weight = self._sums[part], self._known[part], self._weights[part]
        if self._filled[part] < _LONG:  # before that, all count the same
            self._filled[part] += 1
        else:
            self._weights[part] = weight = weight / _MEMORY
        scaled = [(i, value / seconds) for i, value in features]
        for i, value in scaled:
            value *= weight
            known[i] += value
            row = i * _SIZE
            for j, other in scaled:
                sums[row + j] += value * other

    def _fit(self) -> None:
        """Non-negative least squares by coordinate descent from where the prices are."""
        for part, weight in enumerate(self._weights):
            if weight != 1.0:
                self._sums[part] = [value / weight for value in self._sums[part]]
                self._known[part] = [value / weight for value in self._known[part]]
                self._weights[part] = 1.0
        sums = [sum(column) for column in zip(*self._sums)]
        known = [sum(column) for column in zip(*self._known)]
        pull = _LIKE * max(sums[i * _SIZE + i] for i in range(1, _SLOPES + 1)) + 1e-12
        for i in range(1, _SLOPES):
            here, there = i * _SIZE + i, (i + 1) * _SIZE + i + 1
            sums[here] += pull
            sums[there] += pull
            sums[here + 1] -= pull
            sums[there - 1] -= pull
        prices = self._prices
        rows = [
            (i, sums[i * _SIZE : (i + 1) * _SIZE], sums[i * _SIZE + i])
            for i in range(_SIZE)
            if sums[i * _SIZE + i] > 0
        ]
        for _ in range(_SWEEPS):
            for i, row, own in rows:
                rest = known[i] + own * prices[i]
                for a, b in zip(row, prices):
                    rest -= a * b
                prices[i] = max(0.0, rest / own)


def _features(
    tokens: int, keys: int, rows: int | None, pairs: int | None
) -> tuple[int, list[tuple[int, float]]]:
    """The range of sizes that a step is of, and what it is charged for: (price, how many)."""
    features = [(0, 1.0)]
    i = 0
    for i in range(_SLOPES):
        below = _EDGES[i]
        if tokens <= below:
            break
        above = _EDGES[i + 1] if i + 1 < _SLOPES else tokens
        features.append((i + 1, float(min(tokens, above) - below)))
    features += (
        (_ROWS, float(tokens if rows is None else rows)),
        (_KEYS, float(keys)),
        (_PAIRS, float(keys if pairs is None else pairs)),
    )
    return min(len(features) - 4, _SLOPES - 1), features
