"""Greedy order of removal from H = XᵀX: first the head, KV group or neuron of least error once the others are restored.

Optimal brain surgeon over blocks of input columns P of W [out, in], C = H⁻¹: removing P and restoring the rest raises
the output error by tr(W_P C_PP⁻¹ W_Pᵀ); then W ← W - W_P C_PP⁻¹ C_P: and C ← C - C_:P C_PP⁻¹ C_P:.
Updates are kept as low-rank factors over a stretch of removals and applied to the matrices together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.prune.second_order.restore import DAMPING, damped

STRETCH = 64  # columns whose updates are applied together

# (C_PP [u, b, b], W_PᵀW_P [u, b, b], G_P · W_P by column [u, b] on request) of units of b columns -> scores [u]
Score = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Removal:
    """The order in which units are removed. It is nested: removing n units removes the first n of it.

    Units beyond the requested number follow by their final score. An error is the rise of
    tr((W - W') H (W - W')ᵀ), damped H, by one removal.
    """

    order: Tensor  # [units] int64
    errors: Tensor  # [removed] float64

    def kept(self, count: int) -> list[int]:
        """Return the `count` units that stay longest, in ascending order."""
        return sorted(self.order[len(self.order) - count :].tolist())

    def scores(self) -> Tensor:
        """Return ranks [units], 1 for the first removed, as scores that keep these units at every width."""
        return torch.empty(len(self.order), dtype=torch.float64).scatter_(
            0, self.order, torch.arange(1.0, len(self.order) + 1, dtype=torch.float64)
        )


def obs_order(
    gram: Tensor, weight: Tensor, size: int, drop: int, at_once: int = 1, damping: float = DAMPING
) -> Removal:
    """Return the order of `drop` removals of units of `size` consecutive columns, scored exactly after each step.

    `size` is 1 for neurons, the head size for query heads of W_O, head size times queries per group for KV groups. With
    `at_once` above 1, every step removes that many of least score together, with one joint exact update: scores inside
    a step do not account for each other. Time: drop / at_once products of W with a vector or a block.
    """
    return _greedy(gram, weight, size, drop, at_once, _exact, None, damping)


def head_order(gram: Tensor, weight: Tensor, size: int, groups: int, damping: float = DAMPING) -> Removal:
    """Return the order of all query heads of W_O in which KV groups lose heads in turn, each one before any loses two.

    So the first m · groups removals leave groups of equal size, for every m.
    """
    heads = weight.shape[1] // size
    teams = torch.arange(heads) // (heads // groups)
    return _greedy(gram, weight, size, heads, 1, _exact, teams, damping)


def tyr_order(
    gram: Tensor, weight: Tensor, size: int, drop: int, gradient: bool, at_once: int = 1, damping: float = DAMPING
) -> Removal:
    """Return the order by Týr-the-Pruner's local score, |G_p W_pᵀ| + ‖W_p‖² / (2 C_pp), the mean over a unit's columns.

    G = HW is taken by `gradient`, else the first term is left out. G_P of what remains does not change under exact
    updates, so it is computed once.
    """
    return _greedy(gram, weight, size, drop, at_once, _tyr_full if gradient else _tyr_curvature, None, damping)


def head_scores(groups: Removal, heads: Removal) -> Tensor:
    """Return scores [n] of query heads that rank heads inside groups as `heads`, and groups, by any mean, as
    `groups`."""
    each = len(heads.order) // len(groups.order)
    return groups.scores().repeat_interleave(each) + heads.scores() / (len(heads.order) + 1.0)


def _exact(curvature: Tensor, power: Tensor, slope: Tensor | None) -> Tensor:
    if curvature.shape[-1] == 1:
        return (power / curvature).flatten()
    return torch.linalg.solve(curvature, power).diagonal(dim1=-2, dim2=-1).sum(-1)


def _tyr_curvature(curvature: Tensor, power: Tensor, slope: Tensor | None) -> Tensor:
    return 0.5 * (power.diagonal(dim1=-2, dim2=-1) / curvature.diagonal(dim1=-2, dim2=-1)).mean(-1)


def _tyr_full(curvature: Tensor, power: Tensor, slope: Tensor | None) -> Tensor:
    assert slope is not None
    return _tyr_curvature(curvature, power, slope) + slope.abs().mean(-1)


def _greedy(
    gram: Tensor,
    weight: Tensor,
    size: int,
    drop: int,
    at_once: int,
    score: Score,
    teams: Tensor | None,
    damping: float,
) -> Removal:
    units = weight.shape[1] // size
    if weight.shape[1] % size or not 0 <= drop <= units:
        raise ValueError(f"{drop} units of {size} columns cannot be removed from {weight.shape[1]} columns")
    moments = damped(gram, damping)
    wide = weight.to(moments)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    products = wide.T @ wide
    pulls = moments @ products if score is _tyr_full else None
    state = _Stretch(inverse, products, pulls, size, max(STRETCH, size * at_once))
    names = torch.arange(units, device=wide.device)
    teams = names if teams is None else teams.to(wide.device)
    lost = torch.zeros(int(teams.max()) + 1, dtype=torch.int64, device=wide.device)  # units, by team
    order: list[Tensor] = []
    errors: list[Tensor] = []
    removed = 0
    while removed < drop:
        count = min(at_once, drop - removed)
        if not state.room(count):
            names, teams = names[~state.gone], teams[~state.gone]
            state = state.applied()
        scores = score(state.curvature, state.power, state.slope)
        free = ~state.gone & (lost[teams] == lost.min()) if len(lost) < units else ~state.gone
        going = scores.masked_fill(~free, torch.inf).topk(count, largest=False).indices
        errors.append(state.remove(going))
        order.append(names[going])
        lost[teams[going]] += 1
        removed += count
    names = names[~state.gone]
    state = state.applied()
    order.append(names[score(state.curvature, state.power, state.slope).argsort()])
    rises = torch.cat([*errors, wide.new_zeros(0)]).cpu()
    if not bool(rises.isfinite().all()):
        raise ValueError("a Gram matrix lost its rank on the way; raise restore.damping or calibrate on more text")
    return Removal(torch.cat(order).cpu(), rises)


class _Stretch:
    """What scores need of the r columns that are left, with removals not yet applied to the matrices.

    With W = W₀ - V Aᵀ after the removals of this stretch, C = C₀ - A Aᵀ, and WᵀW and GᵀW follow from A, B = W₀ᵀV,
    K = VᵀV and F = GᵀV: the rows of W, however many, are never touched.
    """

    def __init__(self, inverse: Tensor, products: Tensor, pulls: Tensor | None, size: int, width: int):
        self.inverse, self.products, self.pulls = inverse, products, pulls  # C, WᵀW, GᵀW [r, r]
        self.size, self.width, self.used = size, width, 0
        self.curvature = _diagonal_blocks(inverse, size)  # C_PP [u, b, b]
        self.power = _diagonal_blocks(products, size)  # W_PᵀW_P [u, b, b]
        self.slope = None if pulls is None else pulls.diagonal().unflatten(0, (-1, size)).clone()  # G_P · W_P [u, b]
        self.gone = torch.zeros(len(self.power), dtype=torch.bool, device=inverse.device)
        self.a, self.b, self.f = (inverse.new_zeros(len(inverse), width) for _ in range(3))
        self.k = inverse.new_zeros(width, width)

    def room(self, units: int) -> bool:
        return self.used + units * self.size <= self.width

    def remove(self, going: Tensor) -> Tensor:
        """Remove units together; return the rise of the error by each, in order, NaN where C_PP lost its rank."""
        columns = (going[:, None] * self.size + torch.arange(self.size, device=going.device)).flatten()
        old, new = slice(self.used), slice(self.used, self.used + len(columns))
        a, b, k = self.a[:, old], self.b[:, old], self.k[old, old]
        rows = self.inverse[columns] - a[columns] @ a.T  # C_P: [p, r]
        factor, fault = torch.linalg.cholesky_ex(rows[:, columns])  # cholesky would make the host wait for every step

        def solved(values: Tensor) -> Tensor:  # [p, m] to (L⁻¹ values)ᵀ [m, p]
            return torch.linalg.solve_triangular(factor, values, upper=False).T

        fresh_a = solved(rows)
        fresh_b = solved(self.products[columns] - a[columns] @ b.T)
        crossed = solved(b[columns] - a[columns] @ k)  # Vᵀ V' of the old and the new columns of V
        shared = fresh_b - a @ crossed  # Wᵀ V' [r, p]
        fresh_k = solved(shared[columns])
        parts, pairs = (x.unflatten(0, (-1, self.size)) for x in (fresh_a, shared))  # [u, b, p]
        mixed = pairs @ parts.mT
        self.curvature -= parts @ parts.mT
        self.curvature[going] = torch.eye(self.size, dtype=a.dtype, device=a.device)
        self.power += parts @ fresh_k @ parts.mT - mixed - mixed.mT
        if self.pulls is not None:
            self.f[:, new] = solved(self.pulls[:, columns].T - a[columns] @ self.f[:, old].T)
            self.slope -= (self.f[:, new] * fresh_a).sum(1).unflatten(0, (-1, self.size))
        self.a[:, new], self.b[:, new] = fresh_a, fresh_b
        self.k[old, new], self.k[new, old], self.k[new, new] = crossed, crossed.T, fresh_k
        self.used += len(columns)
        self.gone[going] = True
        return fresh_k.diagonal().unflatten(0, (-1, self.size)).sum(1).masked_fill(fault != 0, torch.nan)

    def applied(self) -> "_Stretch":
        """Return the state of the columns that are left, all removals applied."""
        stays = (~self.gone).repeat_interleave(self.size).nonzero().flatten()
        a = self.a[stays]
        half = a @ (self.b[stays] - 0.5 * a @ self.k).T
        inverse, products = (x[stays[:, None], stays] for x in (self.inverse, self.products))
        pulls = None if self.pulls is None else self.pulls[stays[:, None], stays] - self.f[stays] @ a.T
        return _Stretch(inverse - a @ a.T, products - half - half.T, pulls, self.size, self.width)


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    return matrix.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
