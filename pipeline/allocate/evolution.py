"""The width of each projection under a fixed budget: candidates, and an evolutionary search among them.

Týr-the-Pruner (2503.09657) and EvoPress (2410.14649): (1 + λ) evolution in which one place gains what another of the
same kind loses, so that no step changes the number of parameters. Children are selected in stages on increasing amounts
of text; the loss is a function of widths and stage.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Choice = tuple[int, ...]  # units kept, by place
Loss = Callable[[Choice, int], float]  # of a choice, measured as its selection (0, 1, ...) asks for


@dataclass(frozen=True)
class Place:
    """A projection of several candidate widths, ascending, in units of `weights` parameters each."""

    kind: str
    widths: tuple[int, ...]
    weights: int


@dataclass(frozen=True)
class Generation:
    """The best choice after a number of generations; its loss is that of the last selection."""

    number: int
    widths: Choice
    loss: float


def spread(total: int, most: Sequence[int], least: int, step: int) -> Choice:
    """Return widths of `least` plus multiples of `step` that add up to `total`, in nearly equal shares of `most`.

    All of `most` must be `least` plus a multiple of `step`. The remainder is spread over the places. Raise ValueError
    if `total` is out of reach.
    """
    low, high = least * len(most), sum(most)
    if not low <= total <= high or (total - low) % step:
        raise ValueError(f"widths adding up to {total} are impossible: {low} to {high} in steps of {step}")
    widths, reached, given = [], 0, 0
    for width in most:
        reached += width - least
        now = (total - low) * reached // max(1, high - low) // step
        widths.append(least + step * (now - given))
        given = now
    return tuple(widths)


def candidate_widths(centre: int, most: int, least: int, granularity: float, steps: int, multiple: int) -> Choice:
    """Return `steps` widths on either side of `centre`, ascending: S + i · g, i = -steps … steps, as units that stay.

    g of `most` is rounded to a positive multiple; what lies beyond `least` and `most` is clipped to them, so that few
    units have few candidates.
    """
    step = max(1, round(granularity * most / multiple)) * multiple
    return tuple(sorted({min(max(centre + i * step, least), most) for i in range(-steps, steps + 1)}))


def mutated(places: Sequence[Place], widths: Choice, draw: torch.Generator) -> Choice:
    """Return widths with one place a candidate wider and another of its kind narrower by as many parameters.

    Every such pair is equally likely. Where there is none, `widths` are returned.
    """
    ups: dict[tuple[str, int], list[tuple[int, int]]] = {}  # (kind, parameters) -> (place, its new width)
    downs: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for index, (place, width) in enumerate(zip(places, widths, strict=True)):
        level = place.widths.index(width)
        if level + 1 < len(place.widths):
            wider = place.widths[level + 1]
            ups.setdefault((place.kind, place.weights * (wider - width)), []).append((index, wider))
        if level:
            narrower = place.widths[level - 1]
            downs.setdefault((place.kind, place.weights * (width - narrower)), []).append((index, narrower))
    pairs = [(up, down) for key, some in ups.items() for up in some for down in downs.get(key, ()) if up[0] != down[0]]
    if not pairs:
        return widths
    changed = list(widths)
    for index, width in pairs[int(torch.randint(len(pairs), (1,), generator=draw))]:
        changed[index] = width
    return tuple(changed)


def evolve(
    places: Sequence[Place],
    start: Choice,
    loss: Loss,
    generations: int,
    offspring: int,
    survivors: Sequence[int],
    swaps: int,
    seed: int,
    done: Generation | None = None,
) -> Iterator[Generation]:
    """Yield the start as generation 0, then the best choice after each generation.

    A child is its parent mutated 1 to `swaps` times, few times more often than many. Selection s measures what the one
    before left and leaves the best survivors[s], the last one child, which takes its parent's place only if its loss is
    lower: losses never rise. Nothing is measured twice. With `done`, what was yielded before, the rest follows as if
    never interrupted, as far as the loss is deterministic. Raise ValueError if `start` is no choice or survivors do not
    end in one.
    """
    if survivors[-1] != 1 or list(survivors) != sorted(survivors, reverse=True):
        raise ValueError(f"survivors are {list(survivors)}; they must not grow, and end in 1")
    strange = [index for index, place in enumerate(places) if start[index] not in place.widths]
    if strange:
        raise ValueError(f"place {strange[0]} starts at {start[strange[0]]}, not one of {places[strange[0]].widths}")
    measured = _Measured(loss)
    last = len(survivors) - 1
    best = done or Generation(0, start, measured(start, last))
    if done is None:
        yield best
    for number in range(best.number + 1, generations + 1):
        draw = torch.Generator().manual_seed(1_000_003 * seed + number)
        left = _children(places, best.widths, offspring, swaps, draw)
        for selection, count in enumerate(survivors):
            left = sorted(left, key=lambda widths: (measured(widths, selection), widths))[:count]
        best = Generation(number, best.widths, best.loss)
        for child in left:
            if measured(child, last) < best.loss:
                best = Generation(number, child, measured(child, last))
        yield best


class _Measured:
    """Losses measured so far, each once; NaN counts as infinite."""

    def __init__(self, loss: Loss):
        self.loss = loss
        self.seen: dict[tuple[Choice, int], float] = {}

    def __call__(self, widths: Choice, selection: int) -> float:
        if (widths, selection) not in self.seen:
            value = float(self.loss(widths, selection))
            self.seen[widths, selection] = math.inf if math.isnan(value) else value
        return self.seen[widths, selection]


def _children(places: Sequence[Place], parent: Choice, count: int, swaps: int, draw: torch.Generator) -> list[Choice]:
    """Return up to `count` different children, in the order they were drawn."""
    children: dict[Choice, None] = {}
    for _ in range(4 * count):
        if len(children) == count:
            break
        child = parent
        for _ in range(int(torch.randint(1, swaps + 1, (2,), generator=draw).min())):
            child = mutated(places, child, draw)
        if child != parent:
            children[child] = None
    return list(children)
