"""Prompts from packed text: what precedes an assistant's turn of a chat, or how a document begins."""

from dataclasses import dataclass

import numpy as np

from pipeline.model.marks import ids_of


@dataclass(frozen=True)
class Prompts:
    """How prompts are taken from rows: `tokens` at most, and the special tokens around text (`encoding.Frame`)."""

    tokens: int
    after: int
    first: int | None

    def of(self, row: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Return the ids of a prompt from a row of packed text, with or without marks.

        Of a row with marks it is what precedes a turn of the assistant: one that is drawn among those behind `tokens`
        tokens or more, else the last one. Of any other row it is the beginning of a document that is drawn among those
        with `tokens` tokens in the row, else the beginning of the row.
        """
        ids = ids_of(row)
        turns = np.flatnonzero((row[1:] >= 0) & (row[:-1] < 0)) + 1
        if len(turns):
            far = turns[turns >= self.tokens]
            end = int(draw.choice(far)) if len(far) else int(turns[-1])
            return self._opened(ids[max(0, end - self.tokens) : end], end > self.tokens)
        starts = np.flatnonzero(ids == self.after) + 1
        starts = starts[starts + self.tokens <= len(ids)]
        begin = int(draw.choice(starts)) if len(starts) else 0
        opens = begin > 0 and self.first is not None
        return self._opened(ids[begin - opens : begin - opens + self.tokens], begin > 0)

    def _opened(self, ids: np.ndarray, inner: bool) -> np.ndarray:
        """Return ids as a row begins: with `first` in place of the first of them where they are `inner` to a row."""
        return ids if self.first is None or not inner else np.concatenate(([self.first], ids[1:]))
