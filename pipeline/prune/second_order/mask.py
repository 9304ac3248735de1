"""Narrow one layer of a model in place for a while: widths are measured at the cost of copying a few matrices."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import LayerPlan
from pipeline.model.scores import Scores
from pipeline.model.sizes import LayerSizes
from pipeline.prune.head_norms import alone
from pipeline.prune.plan import plan
from pipeline.prune.second_order.hessian import projections
from pipeline.prune.second_order.restore import DAMPING, restore
from pipeline.prune.second_order.sequential import columns_of


@contextmanager
def masked(
    model: nn.Module,
    anatomy: Anatomy,
    wanted: LayerPlan,
    grams: Mapping[str, Tensor] | None = None,
    damping: float = DAMPING,
) -> Iterator[None]:
    """Zero the columns of W_O and W_down that a plan of a layer by its own heads leaves out.

    Gains that span all heads see those that stay (`alone`). With Gram matrices by module name, columns that stay are
    restored. Inside, the layer is the one that `cut` makes of the plan; afterwards its weights are what they were, bit
    for bit.
    """
    heads = torch.tensor([head for group in wanted.groups for head in group.heads], dtype=torch.int64)
    neurons = torch.tensor(wanted.neurons, dtype=torch.int64)
    kept = {"n d": columns_of(heads, anatomy.sizes.head_size), "f": neurons}
    narrowed = dict(alone(anatomy, wanted.host, heads, lambda name: model.get_parameter(name).data))
    for axes, module in projections(anatomy).items():
        name = module.format(layer=wanted.host)
        weight = model.get_parameter(f"{name}.weight").data
        stays = kept[axes].to(weight.device)
        if len(stays) < weight.shape[1]:
            narrow = torch.zeros_like(weight)
            own = restore(weight, grams[name], stays, damping) if grams is not None and len(stays) else weight[:, stays]
            narrow[:, stays] = own.to(narrow)
            narrowed[f"{name}.weight"] = narrow
    changed = [(whole := model.get_parameter(name).data, whole.clone(), narrow) for name, narrow in narrowed.items()]
    try:
        for weight, _, narrow in changed:
            weight.copy_(narrow)
        yield
    finally:
        for weight, whole, _ in changed:
            weight.copy_(whole)


def without(anatomy: Anatomy, scores: Scores, layer: int, groups: int, neurons: int) -> LayerPlan:
    """Return the plan of one layer without its lowest-ranked `groups` KV groups and `neurons` neurons."""
    own = anatomy.sizes.layers[layer]
    left = own.groups - groups
    widths = LayerSizes(left * (own.heads // own.groups), left, own.neurons - neurons)
    return plan(anatomy, scores, [layer], [widths], 0, clap=False).layers[0]
