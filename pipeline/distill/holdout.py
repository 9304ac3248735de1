"""Held-out text: kept out of training, to measure during training whether the model improves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.model.marks import positions


@dataclass(frozen=True)
class Heads:
    """A packed text without the last rows of each of its domains."""

    packed: Any
    domains: tuple[dict, ...]
    rows: np.ndarray  # of the packed text

    @property
    def sequence(self) -> int:
        return self.packed.sequence

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.packed[int(self.rows[row])]


def hold_out(packed: Any, rows: int, section: str) -> tuple[Heads, Tensor]:
    """Return a packed text without the tails of its domains, and the tails [n, sequence].

    `packed` has `domains`, `sequence`, a length, and rows by index. The last rows of each domain are held out, in
    proportion to its size, but never all of them; where every share rounds to none, the last row of the largest domain.
    ValueError, naming the `section` of the settings, where that is over half the text or every domain is one sequence.
    """
    sizes = [domain["sequences"] for domain in packed.domains]
    largest = max(range(len(sizes)), key=lambda domain: (sizes[domain], domain))
    if 2 * rows > sum(sizes):
        raise ValueError(
            f"{section}.eval_tokens: holding out {rows} of the {sum(sizes)} sequences of the recovery text is more "
            "than half; lower it or use more text"
        )
    if sizes[largest] < 2:
        raise ValueError(f"{section}.eval_tokens: every domain of the recovery text is one sequence; use more text")
    tails = [max(0, min(size - 1, round(rows * size / sum(sizes)))) for size in sizes]
    if not any(tails):
        tails[largest] = 1
    ends = np.cumsum(sizes)
    kept = np.concatenate([np.arange(end - size, end - tail) for end, size, tail in zip(ends, sizes, tails)])
    held = np.concatenate([np.arange(end - tail, end) for end, tail in zip(ends, tails)])
    domains = tuple(domain | {"sequences": size - tail} for domain, size, tail in zip(packed.domains, sizes, tails))
    return Heads(packed, domains, kept), torch.from_numpy(np.stack([packed[int(row)] for row in held]).astype(np.int64))


def share_out(rows: Tensor, batch: int, rank: int, world: int, marked: bool = False) -> list[tuple[Tensor, float]]:
    """Return this rank's batches of the rows [n, sequence], weighted so that the mean over ranks is the mean over rows.

    Of `marked` rows it is the mean over the positions that the marks count. Every rank has the same number of batches,
    as engines that partition weights need; surplus ones have weight zero. Raise ValueError where nothing is counted.
    """
    parts: Sequence[Tensor] = rows.split(batch)
    sizes = [int(positions(part).sum()) if marked else len(part) for part in parts]
    if not sum(sizes):
        raise ValueError("none of the held-out tokens is an assistant's; hold out more")
    weighted = [(part, world * size / sum(sizes)) for part, size in zip(parts, sizes)]
    weighted += [(parts[0], 0.0)] * (-len(parts) % world)
    return weighted[rank::world]
