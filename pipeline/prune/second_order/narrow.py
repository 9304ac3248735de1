"""One projection narrowed: which units go by a local order, and what those that stay become.

The step that a layer-by-layer pass repeats: whole KV groups of W_O and then heads inside them, neurons of W_down.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.anatomy import LayerSizes
from pipeline.prune.second_order.removal_order import Removal, head_order, obs_order, tyr_order
from pipeline.prune.second_order.restore import DAMPING, restore
from pipeline.prune.second_order.sequential import at_width, columns_of

ORDERS = ("obs", "tyr", "tyr_curvature")  # exact rise of the error; Týr's score; the same without its G term


@dataclass(frozen=True)
class Narrowed:
    """A whole weight [out, in] in float64 with zero columns where units went, and scores that rank those that stay
    above those that went."""

    weight: Tensor
    scores: Tensor


def local_order(
    by: str, gram: Tensor, weight: Tensor, size: int, drop: int, at_once: int = 1, damping: float = DAMPING
) -> Removal:
    """Give the order in which `drop` units of `size` columns go by one of `ORDERS`; ValueError for another name."""
    if by not in ORDERS:
        raise ValueError(f"restore.local is {by!r}; choose one of {', '.join(ORDERS)}")
    if by == "obs":
        return obs_order(gram, weight, size, drop, at_once, damping)
    return tyr_order(gram, weight, size, drop, by == "tyr", at_once, damping)


def narrow_units(
    weight: Tensor, gram: Tensor, size: int, count: int, by: str, at_once: int = 1, damping: float = DAMPING
) -> Narrowed:
    """Give a weight [out, in] with `count` units of `size` columns, restored exactly for H; scores are of units."""
    removal = local_order(by, gram, weight, size, weight.shape[1] // size - count, at_once, damping)
    return Narrowed(at_width(weight, gram, removal, count, damping), removal.scores())


def narrow_heads(
    weight: Tensor,
    gram: Tensor,
    size: int,
    whole: LayerSizes,
    wanted: LayerSizes,
    by: str,
    damping: float = DAMPING,
) -> Narrowed:
    """Give W_O [h, n · size] with `wanted` KV groups and heads of `whole`, restored exactly for H.

    Whole groups go first, by the order `by`; then, inside those that stay, heads by the exact rise of the error once
    the groups that went are made up for, each group as many.
    """
    each = whole.heads // whole.groups
    groups = local_order(by, gram, weight, each * size, whole.groups - wanted.groups, 1, damping)
    heads = columns_of(torch.tensor(groups.kept(wanted.groups)), each)
    ranks = torch.zeros(whole.heads, dtype=torch.float64)
    columns = columns_of(heads, size).to(gram.device)
    if wanted.heads < len(heads):
        within = restore(weight, gram, columns, damping)
        order = head_order(gram[columns][:, columns], within, size, wanted.groups, damping)
        ranks[heads] = order.scores() / (whole.heads + 1.0)
        columns = columns_of(heads[order.kept(wanted.heads)], size).to(gram.device)
    narrowed = torch.zeros(weight.shape, dtype=torch.float64, device=gram.device)
    narrowed[:, columns] = restore(weight, gram, columns, damping)
    return Narrowed(narrowed, groups.scores().repeat_interleave(each) + ranks)
