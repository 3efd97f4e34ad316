"""Prompt lookup: what followed the last time that the newest tokens stood in the text, may follow again.

After "Prompt Lookup Decoding" (Saxena, 2023) and "Inference with Reference" (LLMA, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.engine.speculative_decoding.draft import Draft
from gossamer.engine.speculative_decoding.length import Offer
from gossamer.engine.speculative_decoding.proposer import Speculated

__all__ = ["Ngram", "NgramIndex"]

_CLASSES = (8, 16)  # a match as long as this is another kind of evidence than one of prompt_lookup_max


class NgramIndex:
    """One text and where each run of `least` to `most` of its tokens stood last.

    A new token costs as many dictionary entries as there are lengths; lookups cost no more, whatever the
    length of the text.
    """

    __slots__ = ("_least", "_places", "_tokens")

    def __init__(self, least: int, most: int) -> None:
        self._least = least
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
        if stop - first == 1:  # the usual case, without what only many tokens are worth
            for length, places in enumerate(self._places[: max(stop - self._least, 0)], self._least):
                places[tuple(text[first - length : first])] = first
            return
        for length, places in enumerate(self._places, self._least):
            start = max(first, length)  # of what follows a run
            if start < stop:
                runs = zip(*[text[start - length + i : stop - length + i] for i in range(length)])
                places.update(zip(runs, range(start, stop)))

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
    more often.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._indices: dict[int, NgramIndex] = {}
        self._places: dict[int, int] = {}

    def offer(self, seq: Speculated, most: int) -> Offer | None:
        """`most` tokens where anything matches. Indexes what is new of the sequence."""
        index = self._indices.get(seq.id)
        if index is None:
            index = self._indices[seq.id] = NgramIndex(self._least, self._most)
            index.extend(seq.prompt_ids)
        new = len(index) - len(seq.prompt_ids)
        if new < len(seq.output_ids):
            index.extend(seq.output_ids[new:])
        place, length = index.find()
        if not length:
            return None
        self._places[seq.id] = place
        kind = next((k for k in reversed(_CLASSES) if length >= k > self._most), min(length, self._most))
        return Offer(seq.id, kind, most)

    def propose(self, wanted: Sequence[tuple[Speculated, int]]) -> list[Draft | None]:
        """Drafts of the lengths wanted, of sequences that had an offer since their newest token."""
        return [Draft(self._indices[seq.id].read(self._places[seq.id], count)) for seq, count in wanted]

    def seconds(self, sequences: int, depth: int, keys: int) -> float:
        """Nothing worth counting."""
        return 0.0

    def forget(self, seq: Speculated) -> None:
        """Drops a sequence's index."""
        self._indices.pop(seq.id, None)
        self._places.pop(seq.id, None)

    def check(self) -> None:
        """It holds no pages."""
