"""Removed experts merged into those that remain: each into the one with the most similar router row."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint, LayerPlan
from pipeline.model.scores import WEIGHTS, Scores


def merge_experts(anatomy: Anatomy, scores: Scores, blueprint: Blueprint, source: Mapping[str, Tensor]) -> Blueprint:
    """Return a plan whose experts are weighted means of themselves and of the removed experts nearest to them.

    Expert j weighs Σ_t g_j(t), the sum of its router weights over calibration tokens; nearest is the largest cosine of
    router rows. Neurons are taken in the order they have in each expert.
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
    shares = []
    for expert, group in members.items():
        own = weights[group]
        parts = own / own.sum() if own.sum() > 0 else torch.tensor([float(each == expert) for each in group])
        shares.append(tuple(zip(group, parts.tolist(), strict=True)))
    return replace(plan, merged=tuple(shares))
