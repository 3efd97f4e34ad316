"""Prompt lookup: what followed the last time that the newest tokens stood in the text, may follow again.

After "Prompt Lookup Decoding" (Saxena, 2023) and "Inference with Reference" (LLMA, 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.length import Offer
from gossamer.engine.speculative_decoding.proposer import BRANCH_PRIOR, RANK, Speculated

__all__ = ["Ngram", "NgramIndex"]

_CLASSES = (8, 16)  # a match as long as this is another kind of evidence than one of prompt_lookup_max


class NgramIndex:
    """One text and where each run of `least` to `most` of its tokens stood last.

    width: for how many different continuations of a run places are kept, the latest of each. A new token
    costs as many dictionary entries as there are lengths; lookups cost no more, whatever the length of the
    text.
    """

    __slots__ = ("_least", "_others", "_places", "_tokens", "_width")

    def __init__(self, least: int, most: int, width: int = 1) -> None:
        self._least, self._width = least, width
        self._others: list[dict[tuple[int, ...], tuple[int, ...]]] = [{} for _ in range(least, most + 1)]
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in range(least, most + 1)]
        self._tokens: list[int] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens. The newest run is not indexed yet: nothing follows it."""
        text = self._tokens
        first = len(text)
        text += tokens
        stop = len(text)
        if stop - first == 1 and self._width == 1:  # the usual case, without what only many tokens are worth
            for length, places in enumerate(self._places[: max(stop - self._least, 0)], self._least):
                places[tuple(text[first - length : first])] = first
            return
        for length, places in enumerate(self._places, self._least):
            start = max(first, length)  # of what follows a run
            if start < stop:
                runs = zip(*[text[start - length + i : stop - length + i] for i in range(length)])
                if self._width == 1:
                    places.update(zip(runs, range(start, stop)))
                else:
                    self._branch(self._others[length - self._least], places, zip(runs, range(start, stop)))

    def _branch(
        self,
        others: dict[tuple[int, ...], tuple[int, ...]],
        places: dict[tuple[int, ...], int],
        runs: Iterable[tuple[tuple[int, ...], int]],
    ) -> None:
        """Takes in where runs stood; what followed otherwise before stays known."""
        text = self._tokens
        for run, place in runs:
            old = places.get(run)
            places[run] = place
            if old is not None and text[old] != text[place]:
                known = (text[old], text[place])
                kept = [old, *(p for p in others.get(run, ()) if text[p] not in known)]
                others[run] = tuple(kept[: self._width - 1])

    def find(self) -> tuple[int, int]:
        """(place, length): the longest run at the text's end that also stood earlier, and what followed it
        the last time; (0, 0) where there is none. Beyond `most`, length counts on to 16 at that place."""
        text, found, length = self._tokens, 0, 0
        most = min(self._least + len(self._places) - 1, len(text))
        for tried in range(self._least, most + 1):  # a run that stood earlier ends in shorter ones that did
            place = self._places[tried - self._least].get(tuple(text[-tried:]))
            if place is None:
                break
            found, length = place, tried
        if length == self._least + len(self._places) - 1:
            most = min(_CLASSES[-1], found)
            while length < most and text[found - length - 1] == text[-length - 1]:
                length += 1
        return found, length

    def others(self, length: int) -> tuple[int, ...]:
        """Places where the text's newest `length` tokens (as `find` gave) went on otherwise than at the place
        found, the latest first."""
        length = min(length, self._least + len(self._others) - 1)
        return self._others[length - self._least].get(tuple(self._tokens[-length:]), ())

    def read(self, place: int, count: int) -> list[int]:
        """What followed from a place on; past the end of the text it is what has been read, once more."""
        text = self._tokens
        tokens = text[place : place + count]
        period = len(tokens)
        while len(tokens) < count:
            tokens.append(tokens[-period])
        return tokens


class Ngram:
    """Proposes by prompt lookup, for any number of sequences.

    The kind of an offer is the length of the match (from 8 on: 8, from 16 on: 16): longer ones are right
    more often. width: up to so many different continuations make a tree; the rank of one is part of its kind.
    """

    def __init__(self, least: int, most: int, width: int = 1) -> None:
        self._least, self._most, self._width = least, most, width
        self._indices: dict[int, NgramIndex] = {}
        self._places: dict[int, tuple[int, ...]] = {}  # the latest, then those of the branches

    def offer(self, seq: Speculated, most: int) -> Offer | None:
        """`most` tokens where anything matches. Indexes what is new of the sequence."""
        index = self._indices.get(seq.id)
        if index is None:
            index = self._indices[seq.id] = NgramIndex(self._least, self._most, self._width)
            index.extend(seq.prompt_ids)
        new = len(index) - len(seq.prompt_ids)
        if new < len(seq.output_ids):
            index.extend(seq.output_ids[new:])
        place, length = index.find()
        if not length:
            return None
        self._places[seq.id] = (place,) if self._width == 1 else (place, *index.others(length))
        kind = next((k for k in reversed(_CLASSES) if length >= k > self._most), min(length, self._most))
        return Offer(seq.id, kind, most)

    def beside(self, seq: Speculated, most: int) -> list[Offer]:
        """The same words' other continuations."""
        return [
            Offer(seq.id, rank * RANK, most, after=0, prior=BRANCH_PRIOR)
            for rank in range(1, len(self._places[seq.id]))
        ]

    def branch(self, seq: Speculated, offer: Offer, count: int) -> list[int]:
        """What followed there."""
        return self._indices[seq.id].read(self._places[seq.id][offer.kind // RANK], count)

    def propose(self, wanted: Sequence[tuple[Speculated, int]]) -> list[Draft | None]:
        """Drafts of the lengths wanted, of sequences that had an offer since their newest token."""
        return [Draft(self._indices[seq.id].read(self._places[seq.id][0], count)) for seq, count in wanted]

    def seconds(self, sequences: int, depth: int, keys: int) -> float:
        """Nothing worth counting."""
        return 0.0

    def forget(self, seq: Speculated) -> None:
        """Drops a sequence's index."""
        self._indices.pop(seq.id, None)
        self._places.pop(seq.id, None)

    def check(self) -> None:
        """It holds no pages."""
