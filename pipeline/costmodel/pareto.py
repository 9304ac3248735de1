"""Searching a shape: the chip model ranks all shapes, a measured loss judges the few left, a stated rule picks one."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from pipeline.costmodel.chip import ELEMENT_BYTES, Chip
from pipeline.costmodel.cost import (
    Work,
    attention_seconds,
    decode,
    decode_rate,
    ends_seconds,
    ffn_seconds,
    mixture_seconds,
    pass_seconds,
    prefill,
    serving_bytes,
)
from pipeline.costmodel.expert_budget import check_covered
from pipeline.costmodel.shapes import AXES, Grid, ModelShape, Multiples, imbalance, multiples_for
from pipeline.costmodel.size_budget import Choice
from pipeline.model.shape import Budgeted

ROOM = 0.9  # candidates have at least this share of the weights of the largest shape within the budget
SKEW = 0.48  # ln² 2: no axis of a candidate below half its balanced share


@dataclass(frozen=True)
class Serving:
    """How the student will be used; `speed` says which of its two passes the search makes fast."""

    batch_size: int
    prompt: int
    context: int
    precision: str
    tensor_parallel: int
    speed: str  # decode | prefill

    def decoding(self) -> Work:
        return decode(self.batch_size, self.context, self.precision, self.tensor_parallel)

    def reading(self) -> Work:
        return prefill(self.batch_size, self.prompt, self.precision, self.tensor_parallel)

    def work(self) -> Work:
        """The pass that the search makes fast."""
        return self.reading() if self.speed == "prefill" else self.decoding()


@dataclass(frozen=True)
class Limits:
    """What a shape must keep to; null: no such limit."""

    parameters: float | None = None  # most, as a fraction of the teacher's non-embedding parameters
    speedup: float | None = None  # least, over the teacher's on the same chip, of the pass `Serving.speed` names
    memory_bytes: float | None = None  # most on one device, weights and cache at `Serving.batch_size` and `context`
    decode_rate: float | None = None  # least tokens a second
    prefill_seconds: float | None = None  # most


@dataclass(frozen=True)
class Candidate:
    """A shape with what the chip model says of it, and its loss once measured."""

    shape: ModelShape
    kept: float  # share of the teacher's non-embedding parameters
    decode_rate: float
    prefill_seconds: float
    memory_bytes: float
    loss: float | None = None
    front: bool = False  # no other measured candidate is faster and better

    def seconds(self, serving: Serving) -> float:
        return self.prefill_seconds if serving.speed == "prefill" else serving.batch_size / self.decode_rate


@dataclass(frozen=True)
class Costed:
    """What the chip model made of all aligned shapes: how many there are, and of those within the limits [shapes]
    their seconds and their share of the teacher's non-embedding parameters."""

    aligned: int
    seconds: tuple[float, ...]
    kept: tuple[float, ...]


@dataclass(frozen=True)
class Search:
    """A finished search: the teacher beside all measured candidates, fastest first, and the one picked."""

    chip: str
    serving: Serving
    tolerance: float
    costed: Costed
    teacher: Candidate
    candidates: tuple[Candidate, ...]
    picked: Candidate


def describe(chip: Chip, teacher: ModelShape, shape: ModelShape, serving: Serving) -> Candidate:
    """Return what the chip model says of one shape."""
    batch, context, precision, devices = serving.batch_size, serving.context, serving.precision, serving.tensor_parallel
    return Candidate(
        shape=shape,
        kept=shape.non_embedding_parameters() / teacher.non_embedding_parameters(),
        decode_rate=decode_rate(chip, shape, batch, context, precision, devices),
        prefill_seconds=pass_seconds(chip, shape, serving.reading()),
        memory_bytes=serving_bytes(shape, batch, context, precision, devices),
    )


def shape_within(
    chip: Chip, teacher: ModelShape, serving: Serving, limits: Limits, multiples: Multiples | None = None
) -> ModelShape:
    """Return the shape within the limits that promises the least loss by the prior alone, nothing being measured.

    The prior is ln(1 / kept) + imbalance: few weights lost, and from every axis its share. Raise ValueError when no
    shape keeps to the limits.
    """
    sieve = _sift(chip, teacher, serving, limits, multiples)
    return _shape(teacher, sieve.rows[np.argmin(sieve.prior)])


def speedup_of(chip: Chip, teacher: ModelShape, serving: Serving, requested: float, chosen: ModelShape) -> Budgeted:
    """Return what budget.speedup reaches with a shape, and the reachable shapes next to it on both sides."""
    grid = Grid(teacher, multiples_for(teacher, serving.tensor_parallel))
    whole = describe(chip, teacher, teacher, serving).seconds(serving)
    values = whole / _grid_seconds(chip, teacher, serving.work(), grid)
    reached = whole / describe(chip, teacher, chosen, serving).seconds(serving)
    return Choice(teacher, grid, grid.accepted).budgeted(values, requested, "speedup", requested, reached, least=True)


def candidates(
    chip: Chip, teacher: ModelShape, serving: Serving, limits: Limits, count: int, multiples: Multiples | None = None
) -> list[Candidate]:
    """Return at most `count` shapes worth measuring, fastest first.

    Of all aligned shapes within the limits, those with at least 90 % of the weights of the largest and no more
    lopsided than one axis at half its balanced share; of these, the ones that no other beats in both speed and prior,
    and as many further fronts behind as `count` asks for; of these, `count` spread evenly over the range of speed, its
    ends included. Raise ValueError when no shape keeps to the limits.
    """
    return _worth(chip, teacher, serving, count, _sift(chip, teacher, serving, limits, multiples))


def _worth(chip: Chip, teacher: ModelShape, serving: Serving, count: int, sieve: "_Sieve") -> list[Candidate]:
    kept = sieve.counts >= ROOM * sieve.counts.max()
    level = sieve.imbalance <= max(SKEW, sieve.imbalance[kept].min())
    left = np.flatnonzero(kept & level)
    chosen: list[int] = []
    while len(chosen) < count and len(left):
        front = _undominated(sieve.seconds[left], sieve.prior[left])
        chosen.extend(left[front].tolist())
        left = left[~front]
    chosen.sort(key=lambda place: (sieve.seconds[place], sieve.prior[place]))
    spread = _spread(np.log(sieve.seconds[chosen]), count)
    return [describe(chip, teacher, _shape(teacher, sieve.rows[chosen[place]]), serving) for place in spread]


def search(
    chip: Chip,
    teacher: ModelShape,
    serving: Serving,
    limits: Limits,
    count: int,
    tolerance: float,
    measure: Callable[[ModelShape], float],
    progress: Callable = lambda each: each,
    multiples: Multiples | None = None,
) -> Search:
    """Measure the loss of every candidate and pick: the fastest whose loss is within `tolerance` nats of the lowest."""
    sieve = _sift(chip, teacher, serving, limits, multiples)
    measured = [
        replace(candidate, loss=float(measure(candidate.shape)))
        for candidate in progress(_worth(chip, teacher, serving, count, sieve))
    ]
    broken = [candidate.shape.axes() for candidate in measured if not np.isfinite(candidate.loss)]
    if broken:
        raise ValueError(f"the loss of {broken[0]} is not finite; check the teacher and the evaluation text")
    seconds = np.array([candidate.seconds(serving) for candidate in measured])
    losses = np.array([candidate.loss for candidate in measured])
    marked = [replace(c, front=bool(f)) for c, f in zip(measured, _undominated(seconds, losses), strict=True)]
    return Search(
        chip=chip.name,
        serving=serving,
        tolerance=tolerance,
        costed=Costed(sieve.aligned, tuple(sieve.seconds.tolist()), tuple(sieve.kept.tolist())),
        teacher=describe(chip, teacher, teacher, serving),
        candidates=tuple(marked),
        picked=pick(marked, serving, tolerance),
    )


def pick(measured: Sequence[Candidate], serving: Serving, tolerance: float) -> Candidate:
    """Return the fastest of the candidates within `tolerance` nats of the lowest loss; ties: the lower loss."""
    losses = [(candidate.loss, candidate) for candidate in measured if candidate.loss is not None]
    lowest = min(loss for loss, _ in losses)
    good = [(candidate.seconds(serving), loss, candidate) for loss, candidate in losses if loss <= lowest + tolerance]
    return min(good, key=lambda each: each[:2])[2]


@dataclass(frozen=True)
class _Sieve:
    """The shapes within the limits, of all `aligned`: rows [shapes, 5] in the order of AXES, the rest [shapes]."""

    aligned: int
    rows: np.ndarray
    counts: np.ndarray
    kept: np.ndarray
    seconds: np.ndarray
    imbalance: np.ndarray
    prior: np.ndarray


def check_alike(teacher: ModelShape) -> None:
    """Refuse a teacher whose attention the chip model does not cover, or whose layers differ: it takes all to be
    alike, but for those with and without experts."""
    check_covered(
        teacher, "model.path", "set recipe.shape=given, and shape.*, budget.total or budget.active_parameters"
    )
    if teacher.own:
        raise ValueError(
            "model.path is a model whose layers differ in width, and the chip model takes all to be alike: no speed of "
            "it can be predicted; set recipe.shape=given, and shape.* or budget.parameters alone"
        )


def _sift(chip: Chip, teacher: ModelShape, serving: Serving, limits: Limits, multiples: Multiples | None) -> _Sieve:
    check_alike(teacher)
    grid = Grid(teacher, multiples or multiples_for(teacher, serving.tensor_parallel))
    decoding = _grid_seconds(chip, teacher, serving.decoding(), grid)
    reading = _grid_seconds(chip, teacher, serving.reading(), grid)
    seconds = reading if serving.speed == "prefill" else decoding
    mask = grid.accepted.copy()
    if limits.parameters is not None:
        mask &= grid.counts <= limits.parameters * teacher.non_embedding_parameters()
    if limits.speedup is not None:
        mask &= describe(chip, teacher, teacher, serving).seconds(serving) >= limits.speedup * seconds
    if limits.decode_rate is not None:
        mask &= serving.batch_size >= limits.decode_rate * decoding
    if limits.prefill_seconds is not None:
        mask &= reading <= limits.prefill_seconds
    if limits.memory_bytes is not None:
        mask &= _grid_bytes(teacher, serving, grid) <= limits.memory_bytes
    if not mask.any():
        reach = float((describe(chip, teacher, teacher, serving).seconds(serving) / seconds[grid.accepted]).max())
        if limits == Limits(speedup=limits.speedup):
            raise ValueError(
                f"budget.speedup: {limits.speedup:g} cannot be reached on {chip.name}; at most {reach:.4g} is"
            )
        raise ValueError(
            f"no aligned student of this teacher keeps to {_stated(limits)} on {chip.name}; "
            "give a wider budget or another device/chip"
        )
    rows, counts = grid.rows(mask)
    kept = counts / teacher.non_embedding_parameters()
    lopsided = imbalance(teacher, rows, kept)
    return _Sieve(int(grid.accepted.sum()), rows, counts, kept, seconds[mask], lopsided, lopsided - np.log(kept))


def _grid_seconds(chip: Chip, teacher: ModelShape, work: Work, grid: Grid) -> np.ndarray:
    """Seconds of a pass for every shape of a grid: blocks add up, so few of them are computed."""
    mixture = teacher.mixture
    attention = [
        [
            attention_seconds(chip, work, hidden, heads, groups, teacher.head_size)
            for heads, groups in grid.attention.tolist()
        ]
        for hidden in grid.hidden.tolist()
    ]
    ffn = [[ffn_seconds(chip, work, h, neurons) for neurons in grid.neurons.tolist()] for h in grid.hidden.tolist()]
    ends = [ends_seconds(chip, work, hidden, teacher.vocabulary) for hidden in grid.hidden.tolist()]
    layers = grid.layers[:, None, None, None]
    sparse = np.zeros_like(layers)
    experts = np.zeros_like(np.array(ffn))
    if mixture is not None:
        sparse = np.minimum(layers, mixture.sparse)
        experts = np.array([[mixture_seconds(chip, work, h, neurons, mixture) for neurons in grid.neurons.tolist()]
                            for h in grid.hidden.tolist()])  # fmt: skip
    blocks = layers * (np.array(attention)[:, :, None] + chip.layer_seconds)  # [layers, hidden, (heads, groups), 1]
    ffns = (layers - sparse) * np.array(ffn)[:, None, :] + sparse * experts[:, None, :]
    return blocks + ffns + np.array(ends)[:, None, None]


def _grid_bytes(teacher: ModelShape, serving: Serving, grid: Grid) -> np.ndarray:
    """Bytes of weights and cache on each device for every shape of a grid, as `serving_bytes` counts them."""
    size, devices = ELEMENT_BYTES[serving.precision], serving.tensor_parallel
    vocabulary = grid.hidden[:, None, None] * (teacher.embedding_parameters() // teacher.hidden)
    groups = -(-grid.attention[:, 1] // devices)  # copied where fewer than the devices
    token = 2 * groups * teacher.head_size * size  # bytes a token leaves in a layer's cache
    cache = serving.batch_size * serving.context * grid.layers[:, None] * token  # [layers, (heads, groups)]
    return (grid.counts + vocabulary) * size / devices + cache[:, None, :, None]


def _shape(teacher: ModelShape, row: np.ndarray) -> ModelShape:
    return replace(teacher, **dict(zip(AXES, row.tolist(), strict=True)))


def _undominated(seconds: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Which points no other is at least as fast and at least as good as, and better in one, [points] booleans."""
    order = np.lexsort((losses, seconds))
    front, lowest, last = np.zeros(len(order), bool), np.inf, None
    for place in order:
        same = last is not None and (seconds[place], losses[place]) == last
        if losses[place] < lowest or same:
            front[place], lowest, last = True, losses[place], (seconds[place], losses[place])
    return front


def _spread(values: np.ndarray, count: int) -> list[int]:
    """Places of at most `count` of these rising values, as evenly spaced as they allow, the ends included."""
    wanted = np.linspace(values[0], values[-1], min(count, len(values)))
    return sorted({int(np.abs(values - value).argmin()) for value in wanted})


def _stated(limits: Limits) -> str:
    given = {name: value for name, value in asdict(limits).items() if value is not None}
    return ", ".join(f"{name}={value:g}" for name, value in given.items()) or "no limit"
