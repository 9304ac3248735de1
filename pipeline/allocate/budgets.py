"""Layer budgets: how wide each layer of a student is, and which layers it has, from scores and losses.

Widths: the same share everywhere; Adapt-Pruner's steps (2502.03460); one threshold for the whole model (FLAP,
2312.11983). Depth by measured loss: greedy, or evolved (EvoPress, 2410.14649).
"""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from pipeline.model.shape import Depth, Trial, check_depth
from pipeline.model.sizes import LayerSizes, Sizes

MOST = 0.99  # sparsity of a layer at most (Adapt-Pruner)

Loss = Callable[[tuple[int, ...]], float]  # of the model of these layers, ascending


def uniform_widths(layers: Sequence[LayerSizes], sparsity: float, multiple: int) -> list[LayerSizes]:
    """Return layers that keep the share 1 - sparsity of their KV groups (whole, with all query heads) and neurons."""
    return widths_at(layers, torch.full((len(layers),), sparsity, dtype=torch.float64), multiple)


def widths_at(layers: Sequence[LayerSizes], sparsities: Tensor, multiple: int) -> list[LayerSizes]:
    """Return layers that keep the share 1 - S of their KV groups and of their neurons, S by layer.

    Groups are rounded to whole ones and neurons to a multiple, halves up, to at least one of each and at most the
    layer's own: a larger S never widens a layer.
    """
    widths = []
    for layer, sparsity in zip(layers, sparsities.tolist(), strict=True):
        groups = max(1, int((1.0 - sparsity) * layer.groups + 0.5))
        neurons = _rounded((1.0 - sparsity) * layer.neurons, layer, multiple)
        widths.append(LayerSizes(groups * (layer.heads // layer.groups), groups, neurons))
    return widths


def adapted(sparsities: Tensor, influence: Tensor, step: float, amplitude: float) -> Tensor:
    """Return the sparsities [layer] after one step of Adapt-Pruner: S ← clip(S + ΔS - A · Ĩ, 0, 0.99).

    Ĩ = (I - mean I) / max |I - mean I| with I = -mean cos(in, out) of each layer of the current model; block influence
    1 - mean cos (`Scores.layers`) gives the same Ĩ. Raise ValueError if A > ΔS: a layer would grow.
    """
    if not 0.0 <= amplitude <= step:
        raise ValueError(
            f"plan.amplitude is {amplitude}; it must lie between 0 and the step {step:.4g}, or a layer would grow"
        )
    centred = influence.to(torch.float64) - influence.to(torch.float64).mean()
    largest = float(centred.abs().max())
    relative = centred / largest if largest > 0.0 else centred
    return (sparsities.to(torch.float64) + step - amplitude * relative).clamp(0.0, MOST)


def threshold_widths(
    sizes: Sizes,
    groups: Sequence[Tensor],
    neurons: Sequence[Tensor],
    fraction: float,
    multiple: int,
    least: tuple[int, int] = (1, 1),
) -> list[LayerSizes]:
    """Return the widths that one threshold on the scores of all KV groups [k] and neurons [f] leaves (FLAP).

    Scores must compare across layers and kinds (standardised). A group costs its weights in Q, K, V and O, a neuron its
    weights in gate, up and down. The lowest are removed until at most `fraction` of the layers' weights is left, after
    rounding neurons to the multiple. `least` groups and neurons stay in every layer. Raise ValueError if that is more
    than `fraction`.
    """
    costs, values, owners = [], [], []
    for layer, widths in enumerate(sizes.layers):
        for kind, scores, cost, floor in (
            (0, groups[layer], group_weights(sizes, widths), least[0]),
            (1, neurons[layer], 3 * sizes.hidden, min(max(least[1], multiple), widths.neurons)),
        ):
            ranked = scores.to(torch.float64).sort().values[: len(scores) - floor]
            values.append(ranked)
            costs += [cost] * len(ranked)
            owners += [(layer, kind)] * len(ranked)
    order = torch.cat(values).argsort(stable=True).tolist()
    budget = fraction * layer_weights(sizes, sizes.layers)
    lowest, highest = 0, len(order)
    while lowest < highest:  # fewest removals that fit; widths fall with every removal
        middle = (lowest + highest) // 2
        if layer_weights(sizes, _without(sizes, [owners[i] for i in order[:middle]], multiple)) <= budget:
            highest = middle
        else:
            lowest = middle + 1
    result = _without(sizes, [owners[i] for i in order[:lowest]], multiple)
    if layer_weights(sizes, result) > budget:
        raise ValueError(f"budget.parameters is {fraction}; {least[0]} groups and {least[1]} neurons a layer need more")
    return result


def group_weights(sizes: Sizes, widths: LayerSizes) -> int:
    """Return the weights of a KV group of a layer of these widths, in Q, K, V and O."""
    return 2 * sizes.hidden * sizes.head_size * (widths.each + 1)


def layer_weights(sizes: Sizes, layers: Sequence[LayerSizes]) -> int:
    """Return the weights of Q, K, V, O, gate, up and down of layers of these widths."""
    return sum(w.groups * group_weights(sizes, w) + 3 * sizes.hidden * w.neurons for w in layers)


def greedy_depth(total: int, count: int, loss: Loss, protected: Collection[int]) -> Depth:
    """Drop layers one at a time, each time the one whose absence gives the least loss, until `count` stay.

    Measures about total · (total - count) models.
    """
    check_depth(count, total, protected)
    trials = _Trials(loss)
    kept = tuple(range(total))
    while len(kept) > count:
        kept = min((_left(kept, {layer}) for layer in _left(kept, protected)), key=trials)
    return trials.result(kept)


def evolved_depth(
    total: int,
    count: int,
    loss: Loss,
    protected: Collection[int],
    start: Sequence[int],
    generations: int,
    offspring: int,
    seed: int,
) -> Depth:
    """Improve the kept layers `start` by (1 + λ) evolution: a child swaps one kept layer, in a quarter of cases two.

    A child replaces its parent only if its loss is lower. No set is measured twice. Raise ValueError if `start` does
    not fit.
    """
    check_depth(count, total, protected)
    best = tuple(sorted(set(start)))
    if len(best) != count or not set(protected) <= set(best) <= set(range(total)):
        raise ValueError(f"start keeps layers {best}; it must be {count} of {total} with {sorted(protected)}")
    trials, draw = _Trials(loss), torch.Generator().manual_seed(seed)
    if count in (total, len(protected)):
        return trials.result(best)
    for _ in range(generations):
        children = [_child(best, total, protected, draw) for _ in range(offspring)]
        best = min((best, *children), key=trials)
    return trials.result(best)


class _Trials:
    """Losses measured so far, each set once; NaN counts as infinite."""

    def __init__(self, loss: Loss):
        self.loss = loss
        self.seen: dict[tuple[int, ...], float] = {}

    def __call__(self, kept: tuple[int, ...]) -> float:
        if kept not in self.seen:
            loss = float(self.loss(kept))
            self.seen[kept] = math.inf if math.isnan(loss) else loss
        return self.seen[kept]

    def result(self, kept: tuple[int, ...]) -> Depth:
        loss = self(kept)
        return Depth(kept, loss, tuple(Trial(*each) for each in self.seen.items()))


def _child(parent: tuple[int, ...], total: int, protected: Collection[int], draw: torch.Generator) -> tuple[int, ...]:
    kept, dropped = list(_left(parent, protected)), sorted(set(range(total)) - set(parent))
    swaps = min(1 + int(torch.rand(1, generator=draw) < 0.25), len(kept), len(dropped))
    leaving = torch.randperm(len(kept), generator=draw)[:swaps].tolist()
    coming = torch.randperm(len(dropped), generator=draw)[:swaps].tolist()
    return tuple(sorted({*_left(parent, {kept[i] for i in leaving}), *(dropped[i] for i in coming)}))


def _left(kept: Sequence[int], gone: Collection[int]) -> tuple[int, ...]:
    return tuple(layer for layer in kept if layer not in gone)


def _without(sizes: Sizes, gone: Sequence[tuple[int, int]], multiple: int) -> list[LayerSizes]:
    """Return the widths after removals named by (layer, 0 for a KV group and 1 for a neuron)."""
    counts = torch.zeros(len(sizes.layers), 2, dtype=torch.int64)
    if gone:
        counts.index_put_(tuple(torch.tensor(gone).T), torch.tensor(1), accumulate=True)
    return [
        LayerSizes(
            (layer.groups - groups) * (layer.heads // layer.groups),
            layer.groups - groups,
            _rounded(layer.neurons - neurons, layer, multiple),
        )
        for layer, (groups, neurons) in zip(sizes.layers, counts.tolist(), strict=True)
    ]


def _rounded(neurons: float, layer: LayerSizes, multiple: int) -> int:
    """Round to the nearest multiple, halves up, within one multiple and the layer's own width."""
    nearest = int(neurons / multiple + 0.5) * multiple
    return layer.neurons if neurons >= layer.neurons else min(max(nearest, multiple), layer.neurons)
