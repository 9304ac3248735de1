"""The shapes a student can have: what they weigh, which are possible, and the one that suits a parameter budget."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.costmodel.mixture import Mixture
from pipeline.model.anatomy import Anatomy
from pipeline.model.hf_config import needs_even_heads
from pipeline.model.sizes import LayerSizes

AXES = ("layers", "hidden", "heads", "groups", "neurons")
WIDTHS = (512, 256, 128, 64, 32, 16)  # 256 bf16 elements are one aligned 512-byte burst; 16 is the cube's edge
STEPS = 8  # steps a teacher's width must still have for a multiple to be used
LEAN = {"layers": 0.25, "hidden": 0.25, "heads": 0.25, "groups": 0.25, "neurons": 0.5}  # share of a budget's logarithm
NEARNESS = 0.05  # share of the budget a shape may leave unused for the sake of balance
FILL = 4.0  # weight of unused budget beside imbalance


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like decoder in plain numbers: SwiGLU, grouped queries, two norms a layer, one at the end, no biases.

    Where layers differ, `own` says what each of the teacher has; of that a student keeps no more than the five numbers.
    `even_heads`: the student's config class refuses hidden sizes that are no multiple of its query heads;
    `whole_heads`: it computes the head size as their quotient. `fixed` axes, each with its reason, are the teacher's in
    every student.
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    head_size: int
    neurons: int
    vocabulary: int
    tied: bool
    own: tuple[LayerSizes, ...] = ()  # empty where all layers are alike
    even_heads: bool = False
    whole_heads: bool = False
    fixed: Mapping[str, str] = field(default_factory=dict, hash=False)
    mixture: Mixture | None = None
    least: int = 1  # layers of every student
    uncounted: str = ""  # why layers have other attention than of query heads and KV groups; empty: all have it

    @staticmethod
    def of(anatomy: Anatomy, biased: bool = False, first: int = 0) -> "ModelShape":
        """Return the shape of a model; of layers that differ it says the most groups, heads of a group, and neurons.

        `biased`: the students will have every bias their class can have, whether or not the model has them. `first`: of
        its first layers so many stay.
        """
        sizes, output = anatomy.sizes, f"{anatomy.writer('n d')}.weight"
        counted = all(anatomy.has(output, layer) for layer, widths in enumerate(sizes.layers) if widths.groups)
        groups = max(widths.groups for widths in sizes.layers)
        return ModelShape(
            layers=len(sizes.layers),
            hidden=sizes.hidden,
            heads=groups * max(widths.each for widths in sizes.layers),
            groups=groups,
            head_size=sizes.head_size,
            neurons=max(widths.for_config.neurons for widths in sizes.layers),
            vocabulary=sizes.vocabulary,
            tied=anatomy.tied,
            own=() if len(set(sizes.layers)) <= 1 else sizes.layers,
            even_heads=needs_even_heads(anatomy, biased),
            whole_heads=anatomy.whole_heads,
            fixed=anatomy.family.fixed,
            mixture=Mixture.of(anatomy),
            least=max(1, len(anatomy.protected_layers(first))),
            uncounted="" if counted else anatomy.family.fixed["heads"],
        )

    def changed(self, axes: Mapping[str, int]) -> "ModelShape":
        """Return the same model with these of its five axes changed."""
        chosen: dict[str, Any] = {axis: axes[axis] for axis in AXES}
        return replace(self, **chosen)

    def each(self) -> tuple[LayerSizes, ...]:
        """What each layer of the teacher keeps at most, [layer of the teacher]; where they are alike, what each has."""
        widest = LayerSizes(self.heads, self.groups, self.neurons)
        return tuple(widest.within(own) for own in self.own) or (widest,) * self.layers

    @property
    def said_heads(self) -> set[int]:
        """The numbers of query heads of which the student's config may say one for all layers: the one that all have,
        or, where layers differ and each says its own, any that a layer of the teacher has."""
        heads = {each.heads for each in self.each()}
        return heads if len(heads) == 1 else {own.heads for own in self.own}

    @property
    def accepted(self) -> bool:
        """Return whether the student's config class takes these widths."""
        if self.whole_heads:
            return self.hidden == self.heads * self.head_size
        return not self.even_heads or any(self.hidden % heads == 0 for heads in self.said_heads)

    def non_embedding_parameters(self) -> int:
        """Everything but the vocabulary matrices; of layers that differ the largest count, whichever will stay."""
        if self.mixture is None:
            ffns = [(each, 3 * each.neurons) for each in self.each()]
        else:
            sparse, dense = self.mixture.rows(self.neurons)
            widest = LayerSizes(self.heads, self.groups, self.neurons)
            ffns = [(widest, sparse)] * self.mixture.sparse + [(widest, dense)] * self.mixture.dense
        rows = (2 * (each.heads + each.groups) * self.head_size + ffn + 2 for each, ffn in ffns)
        return self.hidden * (sum(sorted(rows, reverse=True)[: self.layers]) + 1)  # rows of h weights

    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def parameters(self) -> int:
        return self.non_embedding_parameters() + self.embedding_parameters()

    def axes(self) -> dict[str, int]:
        """The five numbers a student may change, as `shape.json` holds them."""
        return {axis: getattr(self, axis) for axis in AXES}


@dataclass(frozen=True)
class Multiples:
    """What a student's widths are multiples of; heads, groups and neurons are split over `tensor_parallel` shards."""

    hidden: int
    neurons: int
    tensor_parallel: int

    def admits(self, heads: int, groups: int) -> bool:
        """Return whether heads split evenly, and groups too or, where they are fewer, each over a whole number of
        shards."""
        shards = self.tensor_parallel
        return heads % shards == 0 and (groups % shards == 0 or shards % groups == 0)


def multiples_for(teacher: ModelShape, tensor_parallel: int = 1) -> Multiples:
    """Return the multiples for a teacher: the widest of `WIDTHS` that its width per shard holds eight times, at least
    16.

    The hidden axis is whole on every shard; the neurons are split. Raise ValueError where the teacher itself cannot be
    split.
    """
    if teacher.heads % tensor_parallel or teacher.neurons % tensor_parallel:
        raise ValueError(
            f"tensor_parallel is {tensor_parallel}, which does not divide the teacher's {teacher.heads} heads and "
            f"{teacher.neurons} neurons; choose a common divisor"
        )
    shard = _widest(teacher.neurons // tensor_parallel)
    return Multiples(_widest(teacher.hidden), shard * tensor_parallel, tensor_parallel)


def possible_values(teacher: ModelShape, multiples: Multiples) -> dict[str, tuple]:
    """Return the values of each axis: layers, hidden, (heads, groups), neurons; the teacher's own are always among
    them.

    Groups divide the teacher's groups, and no group answers more query heads than the teacher's do.
    """
    queries = teacher.heads // teacher.groups
    attention = {(teacher.heads, teacher.groups)}
    for groups in range(1, teacher.groups + 1):
        if teacher.groups % groups == 0:
            pairs = ((groups * each, groups) for each in range(1, queries + 1))
            attention.update(pair for pair in pairs if multiples.admits(*pair))
    if {"heads", "groups"} & teacher.fixed.keys():
        attention = {(teacher.heads, teacher.groups)}
    hidden = _steps(teacher.hidden, multiples.hidden)
    if teacher.whole_heads:
        hidden = tuple(sorted({heads * teacher.head_size for heads, _ in attention}))
    return {
        "layers": (teacher.layers,) if "layers" in teacher.fixed else tuple(range(teacher.least, teacher.layers + 1)),
        "hidden": (teacher.hidden,) if "hidden" in teacher.fixed else hidden,
        "attention": tuple(sorted(attention)),
        "neurons": (teacher.neurons,) if "neurons" in teacher.fixed else _steps(teacher.neurons, multiples.neurons),
    }


def possible_shapes(
    teacher: ModelShape, least: float, most: float, multiples: Multiples | None = None
) -> Iterator[ModelShape]:
    """Return every aligned shape keeping `least` to `most` of the teacher's non-embedding parameters, smallest
    first."""
    grid = Grid(teacher, multiples or multiples_for(teacher))
    whole = teacher.non_embedding_parameters()
    rows, counts = grid.rows(grid.accepted & (grid.counts >= least * whole) & (grid.counts <= most * whole))
    for row in rows[np.argsort(counts, kind="stable")].tolist():
        yield replace(teacher, **dict(zip(AXES, row, strict=True)))


def shape_for(teacher: ModelShape, fraction: float, multiples: Multiples | None = None) -> ModelShape:
    """Return the balanced, aligned shape that keeps at most `fraction` of the teacher's non-embedding parameters.

    Rule: of the possible shapes that use at least 95 % of the budget (where there are none, of the fullest), the one of
    least Σ_axes ln²(kept share of the axis / fraction^lean) + 4 ln²(used / budget). Layers, hidden, heads and groups
    lean 1/4 and neurons 1/2: a layer's weights are a product of two widths, and neurons cost the least loss a weight.
    Ties: more parameters, then more layers, then a wider stream. Raise ValueError when even the smallest shape is too
    large.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"budget.parameters is {fraction}; give a fraction in (0, 1]")
    if fraction == 1.0:
        return teacher
    grid = Grid(teacher, multiples or multiples_for(teacher))
    budget = fraction * teacher.non_embedding_parameters()
    fits = grid.accepted & (grid.counts <= budget)
    if not fits.any():
        least = grid.counts[grid.accepted].min() / teacher.non_embedding_parameters()
        raise ValueError(f"budget.parameters is {fraction}; the smallest possible shape keeps {least:.4f}")
    fullest = grid.counts[fits].max()
    rows, counts = grid.rows(fits & (grid.counts >= min((1.0 - NEARNESS) * budget, fullest)))
    distance = imbalance(teacher, rows, fraction) + FILL * np.log(counts / budget) ** 2
    best = np.lexsort((-rows[:, 1], -rows[:, 0], -counts, distance.round(12)))[0]
    return replace(teacher, **dict(zip(AXES, rows[best].tolist(), strict=True)))


def depth_for(teacher: ModelShape, fraction: float) -> ModelShape:
    """Return the deepest shape of the teacher's widths that keeps at most `fraction` of its non-embedding parameters.

    Raise ValueError where even the fewest layers are too much.
    """
    budget = fraction * teacher.non_embedding_parameters()
    for layers in range(teacher.layers, teacher.least - 1, -1):
        shape = replace(teacher, layers=layers)
        if shape.non_embedding_parameters() <= budget:
            return shape
    raise ValueError(
        f"budget.parameters is {fraction}; with budget.axes=layers the fewest layers, {teacher.least}, are already more"
    )


def neurons_for(teacher: ModelShape, fraction: float) -> ModelShape:
    """Return the teacher's shape with the widest aligned FFN that keeps at most `fraction` of its non-embedding
    weights.

    To a thousandth: norms, which no neuron takes along, shall not cost a step where all else comes out even. ValueError
    where even the narrowest is too much.
    """
    budget = (fraction + 5e-4) * teacher.non_embedding_parameters()
    for neurons in reversed(possible_values(teacher, multiples_for(teacher))["neurons"]):
        shape = replace(teacher, neurons=neurons)
        if shape.non_embedding_parameters() <= budget:
            return shape
    raise ValueError(
        f"budget.parameters is {fraction}; with budget.axes=neurons the narrowest FFN keeps "
        f"{shape.non_embedding_parameters() / teacher.non_embedding_parameters():.4f}"
    )


def imbalance(teacher: ModelShape, rows: np.ndarray, fraction: float | np.ndarray) -> np.ndarray:
    """Σ_axes ln²(kept share of the axis / fraction^lean) of shapes, [shapes, 5] in the order of AXES to [shapes]."""
    kept = np.log(rows / np.array([getattr(teacher, axis) for axis in AXES]))
    return ((kept - np.log(fraction)[..., None] * np.array([LEAN[axis] for axis in AXES])) ** 2).sum(axis=1)


def _widest(width: int) -> int:
    return next((multiple for multiple in WIDTHS if width >= STEPS * multiple), WIDTHS[-1])


def _steps(width: int, multiple: int) -> tuple[int, ...]:
    return tuple(sorted({*range(multiple, width + 1, multiple), width}))


class Grid:
    """All combinations of possible values, [layers, hidden, (heads, groups), neurons] each: counts, their non-embedding
    weights; accepted, whether the student's class takes them."""

    def __init__(self, teacher: ModelShape, multiples: Multiples):
        values = possible_values(teacher, multiples)
        self.layers, self.hidden, self.attention, self.neurons = (np.array(axis) for axis in values.values())
        pairs = values["attention"]
        kept = [[LayerSizes(heads, groups, 0).within(own) for heads, groups in pairs] for own in teacher.each()]
        bundles = np.array([[pair.heads + pair.groups for pair in layer] for layer in kept]) * teacher.head_size
        times, most_neurons = np.array([[[own.neuron_factor], [own.neurons]] for own in teacher.each()]).transpose(
            1, 0, 2
        )
        neurons = np.minimum(self.neurons * times, most_neurons)  # [layer, neurons]
        ffn = 3 * neurons
        if teacher.mixture is not None:
            kinds = [False] * teacher.mixture.dense + [True] * teacher.mixture.sparse
            pairs_of = [teacher.mixture.rows(count) for count in self.neurons.tolist()]
            ffn = np.array([[sparse if has else dense for sparse, dense in pairs_of] for has in kinds])
        width = 2 * bundles[:, :, None] + ffn[:, None] + 2  # of a layer per hidden channel
        most = np.sort(width, axis=0)[::-1].cumsum(axis=0)  # of 1, 2, ... layers, [layers, (heads, groups), neurons]
        self.counts = self.hidden[:, None, None] * (most[self.layers - 1][:, None] + 1)
        accepted = [
            [replace(teacher, hidden=hidden, heads=heads, groups=groups).accepted for heads, groups in pairs]
            for hidden in values["hidden"]
        ]
        self.accepted = np.broadcast_to(np.array(accepted)[:, :, None], self.counts.shape)

    def rows(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shapes under a mask, [shapes, 5] in the order of AXES, and their parameters, [shapes]."""
        layers, hidden, pair, neurons = np.nonzero(mask)
        heads, groups = self.attention[pair].T
        rows = np.stack([self.layers[layers], self.hidden[hidden], heads, groups, self.neurons[neurons]], axis=1)
        return rows, self.counts[mask]
