"""Removed experts merged into those that remain: each into the one with the most similar router row."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint, LayerPlan
from pipeline.model.scores import WEIGHTS, Scores
from pipeline.prune.surgery.cut import expert_axes, expert_tensors


def merge_experts(anatomy: Anatomy, scores: Scores, blueprint: Blueprint, source: Mapping[str, Tensor]) -> Blueprint:
    """Return a plan whose experts are weighted means of themselves and of the removed experts nearest to them.

    Expert j weighs Σ_t g_j(t), the sum of its router weights over calibration tokens; nearest is the largest cosine of
    router rows. The neurons of a removed expert, whose order has no meaning, are paired with those of the expert that
    it goes into so that the sum of the pairs' cosines is largest.
    """
    layers = (_merged(anatomy, scores, plan, source) if plan.experts else plan for plan in blueprint.layers)
    return replace(blueprint, layers=tuple(layers))


def _merged(anatomy: Anatomy, scores: Scores, plan: LayerPlan, source: Mapping[str, Tensor]) -> LayerPlan:
    rows = torch.nn.functional.normalize(source[anatomy.router.format(layer=plan.host)].to(torch.float64), dim=1)
    weights = scores.routing[plan.host][WEIGHTS]
    members: dict[int, list[int]] = {expert: [expert] for expert in plan.experts}
    for expert in set(range(len(rows))) - set(plan.experts):
        nearest = int((rows[list(plan.experts)] @ rows[expert]).argmax())
        members[plan.experts[nearest]].append(expert)
    neurons, shares, orders = neurons_of(anatomy, source, plan.host), [], []
    for expert, group in members.items():
        own = weights[group]
        parts = own / own.sum() if own.sum() > 0 else torch.tensor([float(each == expert) for each in group])
        shares.append(tuple(zip(group, parts.tolist(), strict=True)))
        wanted = neurons(expert) if len(group) > 1 else None
        orders.append(((), *(paired(wanted, neurons(each)) for each in group[1:] if wanted is not None)))
    return replace(plan, merged=tuple(shares), aligned=tuple(orders))


def neurons_of(anatomy: Anatomy, source: Mapping[str, Tensor], layer: int) -> Callable[[int], Tensor]:
    """Return a function from an expert of a layer to what each of its neurons reads and writes, [x, weights], float32.

    Rows have length 1. Memory: the layer's tensors of all experts, where the checkpoint has such, and one expert.
    """
    found: dict[str, tuple[str, Callable[[int], Tensor]]] = {}  # the names of single experts' tensors once
    for name in sorted(anatomy.routed):
        pattern = anatomy.expert_of[name][0] if name in anatomy.expert_of else name
        if pattern not in found and anatomy.has(name, layer) and _along(anatomy, name) is not None:
            found[pattern] = (name, expert_tensors(anatomy, source, name, layer))

    def neurons(expert: int) -> Tensor:
        parts = [_by_neuron(anatomy, name, read(expert)) for name, read in found.values()]
        return torch.nn.functional.normalize(torch.cat(parts, 1), dim=1)

    return neurons


def _along(anatomy: Anatomy, name: str) -> int | None:
    """Return the dimension of one expert's part of a tensor that runs over its neurons; None where there is none."""
    axes = expert_axes(anatomy, name)
    return next((place for place, axis in enumerate(axes) if "x" in axis.split()), None)


def _by_neuron(anatomy: Anatomy, name: str, tensor: Tensor) -> Tensor:
    """Return one expert's part of a tensor as rows [x, weights] in float32."""
    along, count = int(_along(anatomy, name) or 0), anatomy.sizes.carried["x"]
    fastest = expert_axes(anatomy, name)[along].split()[-1] == "x"  # "2 x": all gates, then the others; "x 2": pairs
    split = tensor.float().movedim(along, 0).unflatten(0, (-1, count) if fastest else (count, -1))
    return split.movedim(int(fastest), 0).flatten(1)


def paired(wanted: Tensor, given: Tensor) -> tuple[int, ...]:
    """Return the order of the neurons `given` [x, weights] whose cosines with `wanted` have the largest sum.

    Time grows as x³, memory as x².
    """
    _, columns = linear_sum_assignment((wanted @ given.T).numpy(), maximize=True)
    return tuple(columns.tolist())
