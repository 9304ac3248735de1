"""Marks of tokens: which of them a loss counts. A token that it does not count is stored as ~id, a negative number."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def marked(ids: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return token ids [n] with marks, by which of them [n] a loss counts."""
    return np.where(counted, ids, ~ids)


def ids_of(tokens: Any) -> Any:
    """Return the ids of tokens, a tensor or an array, with or without marks."""
    return tokens ^ (tokens >> (8 * tokens.dtype.itemsize - 1))  # the sign bit, everywhere: -1 inverts, 0 does not


def positions(tokens: Tensor) -> Tensor:
    """Return which positions of marked tokens [b, s] a loss counts: those whose next token it counts."""
    return torch.cat((tokens[:, 1:] >= 0, torch.zeros_like(tokens[:, :1], dtype=torch.bool)), dim=1)


class Marked:
    """Packed text with its marks: rows of marked tokens."""

    def __init__(self, packed: Any):
        """`packed`: a `Packed` whose rows are marked."""
        self._packed = packed

    @property
    def sequence(self) -> int:
        return self._packed.sequence

    @property
    def domains(self) -> Sequence[dict[str, Any]]:
        return self._packed.domains

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._packed.stored(row)
