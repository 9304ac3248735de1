"""Text kept out of training, to see on the way whether the model gets better."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
    """Give a packed text without the tails of its domains, and the tails [n, sequence].

    `packed` has `domains`, `sequence`, a length, and rows by index. Each domain gives its last rows, as many of `rows`
    as its size is of the whole, and keeps one; where that comes to none, the largest gives one. ValueError, naming the
    `section` of the settings, where that is over half the text, or no domain has a sequence to spare.
    """
    sizes = [domain["sequences"] for domain in packed.domains]
    largest = max(range(len(sizes)), key=lambda domain: (sizes[domain], domain))
    if 2 * rows > sum(sizes):
        raise ValueError(
            f"{section}.validate_tokens holds out {rows} of the {sum(sizes)} sequences of the recovery text, more than "
            "half; lower it or give more text"
        )
    if sizes[largest] < 2:
        raise ValueError(f"{section}.validate_tokens holds out text, and every domain is one sequence; give more text")
    tails = [max(0, min(size - 1, round(rows * size / sum(sizes)))) for size in sizes]
    if not any(tails):
        tails[largest] = 1
    ends = np.cumsum(sizes)
    kept = np.concatenate([np.arange(end - size, end - tail) for end, size, tail in zip(ends, sizes, tails)])
    held = np.concatenate([np.arange(end - tail, end) for end, tail in zip(ends, tails)])
    domains = tuple(domain | {"sequences": size - tail} for domain, size, tail in zip(packed.domains, sizes, tails))
    return Heads(packed, domains, kept), torch.from_numpy(np.stack([packed[int(row)] for row in held]).astype(np.int64))


def share_out(rows: Tensor, batch: int, rank: int, world: int) -> list[tuple[Tensor, float]]:
    """Give this rank's batches of the rows [n, sequence] with weights that make the mean over ranks that over rows.

    Every rank gets equally many, as engines that partition weights need; what is too many has weight zero.
    """
    parts: Sequence[Tensor] = rows.split(batch)
    weighted = [(part, world * len(part) / len(rows)) for part in parts]
    weighted += [(parts[0], 0.0)] * (-len(parts) % world)
    return weighted[rank::world]
