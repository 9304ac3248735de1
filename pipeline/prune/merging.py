"""Removed experts merged into those that remain: each into the one with the most similar router row."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint, LayerPlan
from pipeline.model.scores import WEIGHTS, Scores
from pipeline.prune.surgery.cut import expert_tensor


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
    shares, orders = [], []
    for expert, group in members.items():
        own = weights[group]
        parts = own / own.sum() if own.sum() > 0 else torch.tensor([float(each == expert) for each in group])
        shares.append(tuple(zip(group, parts.tolist(), strict=True)))
        wanted = neurons_of(anatomy, source, plan.host, expert) if len(group) > 1 else None
        orders.append(
            ((), *(paired(wanted, neurons_of(anatomy, source, plan.host, each)) for each in group[1:]))
            if wanted is not None
            else ((),)
        )
    return replace(plan, merged=tuple(shares), aligned=tuple(orders))


def neurons_of(anatomy: Anatomy, source: Mapping[str, Tensor], layer: int, expert: int) -> Tensor:
    """Return what each neuron of an expert reads and writes, [x, weights], scaled to length 1, in float32."""
    count, parts, seen = anatomy.sizes.carried["x"], [], set()
    for name in sorted(anatomy.routed):
        pattern = anatomy.expert_of[name][0] if name in anatomy.expert_of else name
        (segment,) = anatomy.layer_tensors[name]
        axes = segment if name in anatomy.expert_of else segment[1:]
        along = next((place for place, axis in enumerate(axes) if "x" in axis.split()), None)
        if pattern in seen or along is None or not anatomy.has(name, layer):
            continue
        seen.add(pattern)
        tensor = expert_tensor(anatomy, source, name, layer, expert).float().movedim(along, 0)
        fastest = axes[along].split()[-1] == "x"  # "2 x": all gates, then all other neurons; "x 2": in pairs
        split = tensor.unflatten(0, (-1, count) if fastest else (count, -1))
        parts.append(split.movedim(int(fastest), 0).flatten(1))
    return torch.nn.functional.normalize(torch.cat(parts, 1), dim=1)


def paired(wanted: Tensor, given: Tensor) -> tuple[int, ...]:
    """Return the order of the neurons `given` [x, weights] whose cosines with `wanted` have the largest sum."""
    _, columns = linear_sum_assignment((wanted @ given.T).numpy(), maximize=True)
    return tuple(columns.tolist())
