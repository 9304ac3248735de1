"""Týr-the-Pruner's supernet (2503.09657): nested candidates of every W_O and W_down, and models composed of them.

A candidate keeps so many units (KV groups with their heads, or neurons) of one greedy order, those restored exactly,
and is stored as its columns [out, kept · size]; in a model zeros fill the rest of the matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.causal import CausalModel
from pipeline.prune.head_norms import alone
from pipeline.prune.second_order.hessian import projections
from pipeline.prune.second_order.removal_order import Removal
from pipeline.prune.second_order.restore import DAMPING, damped
from pipeline.prune.second_order.sequential import columns_of, expected_weight

Keep = Callable[[int, Tensor], None]  # (units kept, columns [out, kept · size] float64)
Choice = Mapping[str, int]  # units kept, by projection module


def candidates(
    weight: Tensor, gram: Tensor, removal: Removal, counts: Sequence[int], damping: float = DAMPING
) -> Iterator[tuple[int, Tensor]]:
    """Yield (count, columns [out, count · size] float64), each what `restore` gives for removal.kept(count), in order.

    One Cholesky factor serves all: with the units that stay longest first, H = L Lᵀ, the leading block of L is the
    factor of every kept H_KK and that of LᵀWᵀ is L_K⁻¹ (HW)_K, so that W'_K = L_K⁻ᵀ (LᵀWᵀ)_K (W [in, out] here).
    """
    size = weight.shape[1] // len(removal.order)
    wide = weight.to(gram.device, torch.float64, copy=True)
    order = columns_of(removal.order.flip(0).to(gram.device), size)  # the last to go first
    factor = torch.linalg.cholesky(damped(gram, damping)[order][:, order])
    turned = factor.T @ wide[:, order].T  # [in, out]
    for count in counts:
        if count == len(removal.order):
            yield count, wide
            continue
        kept = count * size
        solved = torch.linalg.solve_triangular(factor[:kept, :kept].T, turned[:kept], upper=True)
        yield count, solved[order[:kept].argsort()].T


def expectation(
    weight: Tensor, gram: Tensor, removal: Removal, counts: Sequence[int], keep: Keep, damping: float = DAMPING
) -> Tensor:
    """Return the weight [out, in], float64, whose output is the expectation of the candidates' (eq. 5).

    `keep` is called with each candidate. A candidate of sparsity S_e counts 1 - S_e, the share of its units that stay.
    """
    units = len(removal.order)

    def passing() -> Iterator[Tensor]:
        for count, columns in candidates(weight, gram, removal, counts, damping):
            keep(count, columns)
            yield widened(columns, removal.order, count, weight.shape[1])

    return expected_weight(passing(), [1.0 - count / units for count in counts])


def widened(columns: Tensor, order: Tensor, count: int, width: int) -> Tensor:
    """Return the whole weight [out, width] of a candidate: its columns where units stay longest, zeros elsewhere."""
    whole = torch.zeros(len(columns), width, dtype=columns.dtype, device=columns.device)
    units = order[len(order) - count :].sort().values
    whole[:, columns_of(units.to(columns.device), width // len(order))] = columns
    return whole


@torch.no_grad()
def compose(
    model: CausalModel,
    anatomy: Anatomy,
    source: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    choice: Choice,
    present: dict[str, int],
) -> None:
    """Load the candidates of a choice into the projections of a causal model, and update `present`, which it holds.

    `stored` may be lazy and holds, by `candidate`, columns, and by `removal_of` the order [units] of each module; the
    dense tensors of `source` are those whose gains span all heads and see the chosen ones (`alone`). Only what differs
    is read.
    """
    output = projections(anatomy)["n d"]
    layers = {output.format(layer=layer): layer for layer in range(len(anatomy.sizes.layers))}
    for name, count in choice.items():
        if present.get(name) == count:
            continue
        weight, order = model.get_submodule(name).weight, stored[removal_of(name)]
        weight.copy_(widened(stored[candidate(name, count)], order, count, weight.shape[1]))
        if name in layers:
            heads = columns_of(order[len(order) - count :], anatomy.sizes.layers[layers[name]].heads // len(order))
            for other, narrow in alone(anatomy, layers[name], heads, source.__getitem__):
                model.get_parameter(other).copy_(narrow)
        present[name] = count


def candidate(name: str, count: int) -> str:
    """Return the name under which the candidate of `count` units of a projection is stored."""
    return f"{name}.{count}"


def removal_of(name: str) -> str:
    """Return the name under which a projection's order of removal is stored."""
    return f"{name}.order"
