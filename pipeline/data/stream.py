"""Endless batches: shuffled by a seed, strided over ranks, resumable from a position."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.packing import Packed


class Rows(Protocol):
    """Packed text: rows of `sequence` token ids by index, and its domains, each with `sequences` and `weight`."""

    @property
    def sequence(self) -> int: ...

    @property
    def domains(self) -> Sequence[dict[str, Any]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> np.ndarray: ...


def stream(packed: Rows, batch: int, rank: int, world: int, start: int, seed: int) -> Iterator[Tensor]:
    """Yield this rank's batches, int64 [batch, sequence], without end, from global position `start` on.

    The position counts rows consumed by all ranks together; rank r of w takes positions start + r, start + r + w, ...
    So the batches of w ranks, interleaved, are those of one rank with w times the batch, and the stream from p is the
    tail of the stream from 0. Every epoch is shuffled again from `seed`. Without weights an epoch has every row once;
    with weights a domain has its share of an epoch's rows, and goes through its own rows in turn, none twice before
    each was once.
    """
    if batch < 1 or start < 0 or not 0 <= rank < world:
        fault = f"stream of batch {batch} from {start} for rank {rank} of {world}"
        raise ValueError(f"{fault} is impossible; needs batch >= 1, start >= 0 and 0 <= rank < world")
    return _batches(packed, batch, rank, world, start, seed)


def left_over(packed: Packed, used: int, seed: int) -> list[int]:
    """Return the rows that no position of the stream before `used` holds, in the order of the text."""
    sizes = [domain["sequences"] for domain in packed.domains]
    draws = _draws(sizes, [domain["weight"] for domain in packed.domains])
    seen: set[int] = set()
    for epoch, begun in enumerate(range(0, used, sum(draws))):
        seen.update(_order(sizes, draws, seed, epoch)[: used - begun].tolist())
    return [row for row in range(len(packed)) if row not in seen]


@dataclass(frozen=True)
class Beginning:
    """One rank's share of the first `wanted` sequences of the shuffled text, in batches [b, sequence], the last of them
    smaller where necessary. Its length counts batches; it can be iterated again."""

    packed: Packed
    wanted: int  # sequences of all ranks together
    batch: int
    rank: int
    world: int
    seed: int

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.wanted, self.world)) // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        whole = self.wanted // (self.batch * self.world)
        yield from islice(stream(self.packed, self.batch, self.rank, self.world, 0, self.seed), whole)
        begun = whole * self.batch * self.world
        rest = len(range(self.rank, self.wanted - begun, self.world))
        if rest:
            yield next(stream(self.packed, rest, self.rank, self.world, begun, self.seed))


def beginning(packed: Packed, tokens: int, batch: int, rank: int, world: int, seed: int) -> Beginning:
    """Return a rank's share of the first `tokens` tokens: one sequence at least, and no more than the text has."""
    return Beginning(packed, min(max(1, tokens // packed.sequence), len(packed)), batch, rank, world, seed)


def _batches(packed: Rows, batch: int, rank: int, world: int, start: int, seed: int) -> Iterator[Tensor]:
    sizes = [domain["sequences"] for domain in packed.domains]
    draws = _draws(sizes, [domain["weight"] for domain in packed.domains])
    length = sum(draws)
    epoch, order = -1, np.empty(0, dtype=np.int64)
    while True:
        rows = np.empty((batch, packed.sequence), dtype=np.int64)
        for i in range(batch):
            wanted, place = divmod(start + rank + i * world, length)
            if wanted != epoch:
                epoch, order = wanted, _order(sizes, draws, seed, wanted)
            rows[i] = packed[int(order[place])]
        yield torch.from_numpy(rows)
        start += batch * world


def _draws(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Return the rows of each domain in an epoch: all its rows, or its share by weight of as many rows as there are."""
    known = [weight for weight in weights if weight is not None]
    if len(known) < len(weights):
        return list(sizes)
    exponent = math.frexp(max(known))[1]
    shares = [math.ldexp(weight, -exponent) for weight in known]  # below 1: their sum is finite
    return [max(1, round(sum(sizes) * share / sum(shares))) for share in shares]


def _order(sizes: Sequence[int], draws: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Return the rows of an epoch in their order, [sum of draws]."""
    rows, begin = [], 0
    for domain, (size, drawn) in enumerate(zip(sizes, draws)):
        turns, places = np.divmod(np.arange(epoch * drawn, (epoch + 1) * drawn), size)
        for turn in np.unique(turns):
            rows.append(begin + np.random.default_rng([seed, domain, turn]).permutation(size)[places[turns == turn]])
        begin += size
    return np.random.default_rng([seed, len(sizes), epoch]).permutation(np.concatenate(rows))
