"""Narrowing one projection: which units are removed, by a local order, and the weights of those that stay.

A layer-by-layer pass repeats this step: whole KV groups of W_O and then heads inside them, neurons of W_down.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline.model.sizes import LayerSizes
from pipeline.prune.second_order.removal_order import Removal, head_order, obs_order, tyr_order
from pipeline.prune.second_order.restore import DAMPING, restore
from pipeline.prune.second_order.sequential import at_width, columns_of

# By restore.local: the exact rise of the error; Týr's score; the same without its G term.
LOCAL_ORDERS: dict[str, Callable[..., Removal]] = {
    "obs": obs_order,
    "tyr": partial(tyr_order, gradient=True),
    "tyr_curvature": partial(tyr_order, gradient=False),
}


@dataclass(frozen=True)
class Narrowed:
    """A whole weight [out, in] in float64 with zero columns for removed units, and scores that rank those that stay
    above those that were removed."""

    weight: Tensor
    scores: Tensor


def local_order(
    by: str, gram: Tensor, weight: Tensor, size: int, drop: int, at_once: int = 1, damping: float = DAMPING
) -> Removal:
    """Return the order in which `drop` units of `size` columns are removed, by one of `LOCAL_ORDERS`."""
    if by not in LOCAL_ORDERS:
        raise ValueError(f"restore.local: unknown value {by!r}; choose from {', '.join(LOCAL_ORDERS)}")
    return LOCAL_ORDERS[by](gram, weight, size, drop, at_once=at_once, damping=damping)


def narrow_units(
    weight: Tensor, gram: Tensor, size: int, count: int, by: str, at_once: int = 1, damping: float = DAMPING
) -> Narrowed:
    """Return a weight [out, in] with `count` units of `size` columns, restored exactly for H; scores are of units."""
    removal = local_order(by, gram, weight, size, weight.shape[1] // size - count, at_once, damping)
    return Narrowed(at_width(weight, gram, removal, count, damping), removal.scores())


def narrow_heads(
    weight: Tensor,
    gram: Tensor,
    size: int,
    whole: LayerSizes,
    target: LayerSizes,
    by: str,
    damping: float = DAMPING,
) -> Narrowed:
    """Return W_O [h, n · size] with the KV groups and heads of `target`, of those of `whole`, restored exactly for H.

    Whole groups are removed first, by the order `by`; then, as many in each group that stays, heads by the exact rise
    of the error once the removed groups are compensated.
    """
    each = whole.heads // whole.groups
    groups = local_order(by, gram, weight, each * size, whole.groups - target.groups, 1, damping)
    heads = columns_of(torch.tensor(groups.kept(target.groups)), each)
    ranks = torch.zeros(whole.heads, dtype=torch.float64)
    columns = columns_of(heads, size).to(gram.device)
    if target.heads < len(heads):
        within = restore(weight, gram, columns, damping)
        order = head_order(gram[columns][:, columns], within, size, target.groups, damping)
        ranks[heads] = order.scores() / (whole.heads + 1.0)
        columns = columns_of(heads[order.kept(target.heads)], size).to(gram.device)
    narrowed = torch.zeros(weight.shape, dtype=torch.float64, device=gram.device)
    narrowed[:, columns] = restore(weight, gram, columns, damping)
    return Narrowed(narrowed, groups.scores().repeat_interleave(each) + ranks)
