"""One layer narrowed in place and put back: many widths of one model measured, each for a copy of a few columns."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipeline.model.anatomy import Anatomy, LayerSizes
from pipeline.model.blueprint import LayerPlan
from pipeline.model.scores import Scores

from .gram import projections
from .plan import plan
from .sequential import columns_of


@contextmanager
def masked(model: nn.Module, anatomy: Anatomy, wanted: LayerPlan) -> Iterator[None]:
    """Zero the columns of W_O and W_down that a plan of a layer by its own heads leaves out.

    Inside, the layer is the one that `cut` makes of the plan; afterwards its weights are what they were, bit for bit.
    """
    heads = torch.tensor([head for group in wanted.groups for head in group.heads], dtype=torch.int64)
    neurons = torch.tensor(wanted.neurons, dtype=torch.int64)
    kept = {"n d": columns_of(heads, anatomy.sizes.head_size), "f": neurons}
    gone = []
    for axes, module in projections(anatomy).items():
        weight = model.get_submodule(module.format(layer=wanted.host)).weight.data
        leaves = torch.ones(weight.shape[1], dtype=torch.bool)
        leaves[kept[axes]] = False
        columns = leaves.nonzero().flatten().to(weight.device)
        gone.append((weight, columns, weight[:, columns]))
    try:
        for weight, columns, _ in gone:
            weight[:, columns] = 0
        yield
    finally:
        for weight, columns, values in gone:
            weight[:, columns] = values


def without(anatomy: Anatomy, scores: Scores, layer: int, groups: int, neurons: int) -> LayerPlan:
    """Give the plan of one layer without its lowest-ranked KV groups and neurons, so many: those that `plan` drops."""
    own = anatomy.sizes.layers[layer]
    left = own.groups - groups
    widths = LayerSizes(left * (own.heads // own.groups), left, own.neurons - neurons)
    return plan(anatomy, scores, [layer], [widths], 0, clap=False).layers[0]
