"""Decontamination: pieces of text that evaluation text shares are kept out of calibration and recovery.

The rule is the n-gram rule of GPT-3 (2005.14165, appendix C) on the model's own tokens: a piece is left out if a run of
13 of its tokens occurs in evaluation text too. As there, a run that occurs in more than ten pieces is common, such as a
system prompt or a licence, and no leak; nor is a run of which such text is more than half. A piece is a copy, and left
out however common its runs are, if four in five of them occur in evaluation text. A tokenizer of bytes cuts text so
finely that 13 of its tokens are a word or two: its runs are longer, see `run_length`.
"""

import math
from collections.abc import Iterable

import numpy as np

RUN = 13  # tokens
FINE = 2.5  # bytes per token; a tokenizer below it has runs of FINE_RUN bytes, about as long as 13 tokens of others
FINE_RUN = 64
COMMON = 10  # pieces; a run in more of them is no leak
COPY = 0.8  # of the runs of a piece; with more of them in evaluation text it is a copy

_GOLDEN = 0x9E3779B97F4A7C15


def run_length(tokens: int, size: int) -> int:
    """Return the tokens of a run where `tokens` tokens are `size` bytes of text."""
    return RUN if size >= FINE * tokens else math.ceil(FINE_RUN * tokens / size)


def runs(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return a hash, uint64 [n - length + 1], of every run of `length` tokens; empty for fewer tokens."""
    count = max(0, len(tokens) - length + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    mixed = _mixed(tokens.astype(np.uint64))
    for place in range(length if count else 0):
        hashes += mixed[place : place + count] * np.uint64(_GOLDEN * (2 * place + 1) % 2**64)
    return _mixed(hashes)


def covered(hits: np.ndarray, length: int) -> np.ndarray:
    """Return which tokens belong to a run that is hit, bool [n]; hits, bool [n - length + 1], are by first token."""
    edges = np.zeros(len(hits) + length, dtype=np.int64)
    first = np.flatnonzero(hits)
    np.add.at(edges, first, 1)
    np.add.at(edges, first + length, -1)
    return np.cumsum(edges[:-1]) > 0


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return uint64 values mixed well (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class EvaluationRuns:
    """The runs of `length` tokens of all evaluation texts.

    Memory: 13 bytes for every distinct run, and 16 more for those of a text while it is added.
    """

    def __init__(self, length: int):
        self.length = length
        self._known = np.empty(0, dtype=np.uint64)  # sorted
        self._pieces = np.empty(0, dtype=np.int32)  # of calibration or recovery text that have each
        self._met = np.empty(0, dtype=bool)  # in what was left out
        self._parts: list[np.ndarray] = []

    def add(self, tokens: np.ndarray) -> None:
        """Note the next tokens of an evaluation text, the end of those before it joined to them."""
        self._parts.append(np.unique(runs(tokens, self.length)))

    def finish(self) -> None:
        """End the evaluation text: its runs are known from here on."""
        self._known = np.unique(np.concatenate([self._known, *self._parts]))
        self._parts = []
        self._met = np.zeros(len(self._known), dtype=bool)
        self.forget()

    def forget(self) -> None:
        """Forget how many pieces have each run."""
        self._pieces = np.zeros(len(self._known), dtype=np.int32)

    def count(self, tokens: np.ndarray, pieces: np.ndarray) -> None:
        """Count the pieces that have each run; `pieces` [n] are the numbers of the pieces of tokens [n]."""
        known, places = self._found(tokens)
        if known.any():
            pairs = np.unique(np.stack([places[known], pieces[: len(known)][known]]), axis=1)
            np.add.at(self._pieces, pairs[0], 1)

    def shared(self, tokens: np.ndarray, pieces: np.ndarray, copies: bool) -> set[int]:
        """Return the pieces that are to be left out; with `copies`, copies alone.

        `pieces` [n] are the numbers of the pieces of tokens [n], -1 for those of no piece.
        """
        known, places = self._found(tokens)
        if not known.any():
            return set()
        first, last = pieces[: len(known)], pieces[self.length - 1 :]
        inside = (first == last) & (first >= 0)
        windows, alike = (np.bincount(first[which], minlength=len(pieces)) for which in (inside, inside & known))
        result = np.flatnonzero((windows > 0) & (alike >= COPY * windows))
        met = known & inside & np.isin(first, result)
        if not copies:
            common = known & (self._pieces[places] > COMMON)
            own = np.concatenate([[0], np.cumsum(~covered(common, self.length))])
            leaks = known & ~common & (2 * (own[self.length :] - own[: -self.length]) >= self.length)
            result = np.union1d(result, pieces[covered(leaks, self.length)])
            met |= leaks
        self._met[places[met]] = True
        return set(result[result >= 0].tolist())

    def met(self, stretches: Iterable[np.ndarray]) -> tuple[int, int]:
        """Return how many tokens of evaluation text belong to runs that were met elsewhere, and how many it has."""
        shared = total = 0
        for tokens in stretches:
            known, places = self._found(tokens)
            known[known] = self._met[places[known]]
            shared += int(covered(known, self.length).sum()) if known.any() else 0
            total += len(tokens)
        return shared, total

    def _found(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which runs are known, and where; the places of the others mean nothing."""
        hashes = runs(tokens, self.length)
        if not len(self._known):
            return np.zeros(len(hashes), dtype=bool), np.zeros(len(hashes), dtype=np.int64)
        places = np.searchsorted(self._known, hashes).clip(max=len(self._known) - 1)
        return self._known[places] == hashes, places
