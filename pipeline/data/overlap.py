"""Decontamination: text that shares runs of RUN tokens with evaluation text is kept out of calibration and recovery.

The rule is the n-gram rule of GPT-3 (2005.14165, appendix C) on the model's own tokens: what is compared is what is
learnt from and what is measured. A run that recurs in many documents of one evaluation text, such as a system prompt, a
licence or the frame of an instruction, is no leak and is ignored.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

RUN = 13  # tokens
COMMON_DOCUMENTS = 10  # a run in so many documents of an evaluation text ...
COMMON_SHARE = 0.1  # ... and in such a share of them is ignored

_ODD = np.array([(0x9E3779B97F4A7C15 * (2 * place + 1)) % 2**64 | 1 for place in range(RUN)], dtype=np.uint64)


def runs(tokens: np.ndarray) -> np.ndarray:
    """Return a hash, uint64 [n - RUN + 1], of every run of RUN tokens; empty for fewer tokens."""
    count = max(0, len(tokens) - RUN + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    mixed = _mixed(tokens.astype(np.uint64))
    for place in range(RUN if count else 0):
        hashes += mixed[place : place + count] * _ODD[place]
    return _mixed(hashes)


def covered(hits: np.ndarray, tokens: int) -> np.ndarray:
    """Return which of `tokens` tokens belong to a run that is hit, bool [tokens]; hits are by a run's first token."""
    edges = np.zeros(tokens + 1, dtype=np.int64)
    first = np.flatnonzero(hits)
    np.add.at(edges, first, 1)
    np.add.at(edges, first + RUN, -1)
    return np.cumsum(edges[:-1]) > 0


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return uint64 values mixed well (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass
class Stretch:
    """The tokens that came before, as far as a run can reach back into them."""

    tail: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def joined(self, tokens: np.ndarray) -> np.ndarray:
        """Return the tail and the tokens."""
        return np.concatenate([self.tail, tokens])

    def extend(self, tokens: np.ndarray) -> None:
        """Let tokens follow."""
        self.tail = self.joined(tokens)[-(RUN - 1) :].astype(np.int64)


class EvaluationRuns:
    """The runs of all evaluation texts, and which of them were met in calibration or recovery text.

    Memory: 8 bytes, and while it is filled 16, for every distinct run.
    """

    def __init__(self):
        self._known = np.empty(0, dtype=np.uint64)  # sorted
        self._met = np.empty(0, dtype=bool)
        self._documents: list[np.ndarray] = []  # of the text under way: the runs of each document, none twice
        self._parts: list[np.ndarray] = []  # of the document under way
        self._stretch = Stretch()

    def add(self, tokens: np.ndarray, ends: bool) -> None:
        """Note the next tokens of an evaluation text; `ends`: their document ends with them."""
        self._parts.append(runs(self._stretch.joined(tokens)))
        self._stretch.extend(tokens)
        if ends:
            self._documents.append(np.unique(np.concatenate(self._parts)))
            self._parts = []

    def finish(self) -> None:
        """End an evaluation text: its runs that are not common to many of its documents are known from here on."""
        documents = [*self._documents, *([np.unique(np.concatenate(self._parts))] if self._parts else [])]
        self._documents, self._parts, self._stretch = [], [], Stretch()
        if not documents:
            return
        found, counts = np.unique(np.concatenate(documents), return_counts=True)
        common = (counts >= COMMON_DOCUMENTS) & (counts >= COMMON_SHARE * len(documents))
        self._known = np.union1d(self._known, found[~common])
        self._met = np.zeros(len(self._known), dtype=bool)

    def hits(self, tokens: np.ndarray) -> np.ndarray:
        """Return which runs of tokens are known, bool [n - RUN + 1], and note that they were met."""
        known, places = self._found(tokens)
        self._met[places[known]] = True
        return known

    def met(self, stretches: Iterable[np.ndarray]) -> tuple[int, int]:
        """Return how many tokens of evaluation text belong to runs that were met elsewhere, and how many it has."""
        shared = total = 0
        for tokens in stretches:
            known, places = self._found(tokens)
            known[known] = self._met[places[known]]
            shared += int(covered(known, len(tokens)).sum())
            total += len(tokens)
        return shared, total

    def _found(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which runs are known, and where; the places of the others mean nothing."""
        hashes = runs(tokens)
        if not len(self._known):
            return np.zeros(len(hashes), dtype=bool), np.zeros(len(hashes), dtype=np.int64)
        places = np.searchsorted(self._known, hashes).clip(max=len(self._known) - 1)
        return self._known[places] == hashes, places
