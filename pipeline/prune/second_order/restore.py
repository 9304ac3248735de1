"""Least-squares restoration: the input columns that stay compensate for those that are removed.

With H = XᵀX at the input of W and kept columns K, W'_K = argmin tr((W - W'_K) H (W - W'_K)ᵀ) = (W H)_K H_KK⁻¹. One
core, H and then `removal` and then this solve, serves OSSCAR (2403.12983), FASP (2501.09412: its own scores and this
solve), SlimGPT (2412.18110: whole heads as units) and the local step of Týr-the-Pruner (2503.09657: `tyr_order`).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint, LayerPlan
from pipeline.prune.second_order.hessian import projections
from pipeline.prune.surgery.reinit import Stream

DAMPING = 0.01  # of the mean diagonal of H
LIMIT = 1e4  # no positive semidefinite matrix needs this much


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Return H + λI in float64, λ = damping times the mean diagonal, ten times more until Cholesky accepts it.

    Used for H throughout, it draws the solution to the unchanged W_K and not to zero, so that keeping all columns
    gives W. Raise ValueError if H is zero or not finite.
    """
    wide = gram.to(torch.float64)
    scale = float(wide.diagonal().mean())
    while 0.0 < damping * scale < LIMIT * scale and bool(torch.isfinite(wide).all()):
        candidate = wide + damping * scale * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        if int(torch.linalg.cholesky_ex(candidate).info) == 0:
            return candidate
        damping *= 10.0
    raise ValueError(
        f"a Gram matrix of mean diagonal {scale:.3g} cannot be inverted: it must be finite and not zero, and its "
        "damping above zero; calibrate on more or other text"
    )


def restore(weight: Tensor, gram: Tensor, kept: Sequence[int] | Tensor, damping: float = DAMPING) -> Tensor:
    """Return the restored columns [out, kept], float64, of weight [out, in] for H [in, in], in the order of `kept`.

    W'_K = W_K + W_D H_DK H_KK⁻¹ for dropped columns D, which is (W H)_K H_KK⁻¹. It is computed where H is.
    """
    wide = weight.to(gram.device, torch.float64)
    places = torch.as_tensor(kept, device=wide.device)
    dropped = torch.ones(wide.shape[1], dtype=torch.bool, device=wide.device)
    dropped[places] = False
    if not dropped.any():
        return wide[:, places]
    moments = damped(gram, damping)
    factor = torch.linalg.cholesky(moments[places][:, places])
    lost = wide[:, dropped] @ moments[dropped][:, places]  # W_D H_DK [out, kept]
    return wide[:, places] + torch.cholesky_solve(lost.T, factor).T


def restore_outputs(
    anatomy: Anatomy,
    blueprint: Blueprint,
    source: Mapping[str, Tensor],
    grams: Mapping[str, Tensor],
    stream: Stream,
    damping: float = DAMPING,
) -> Iterator[tuple[str, Tensor]]:
    """Yield a cut stream with W_O and W_down restored from the source's whole matrices; the rest passes unchanged.

    `grams` gives H by source module name and may be lazy. Columns are solved over all rows, then rows are selected by
    the blueprint's channels, which commutes. Where heads were donated (CLAP), the host's own heads restore the host's
    attention and donated columns stay as they were cut: how donors answer to the host's stream was never measured.
    Raise ValueError where a Gram matrix is missing, with its name.
    """
    places = {
        module.format(layer=place) + ".weight": (axis, module, plan)
        for place, plan in enumerate(blueprint.layers)
        for axis, module in projections(anatomy).items()
    }
    channels = torch.tensor(blueprint.channels)
    for name, tensor in stream:
        if name in places:
            axis, module, plan = places[name]
            kept, columns = own_columns(anatomy, axis, plan)
            host = module.format(layer=plan.host)
            if 0 < len(kept) < anatomy.sizes.length(axis, plan.host):
                if host not in grams:
                    raise ValueError(f"no Gram matrix of {host}, whose columns are to be restored; measure its layer")
                restored = restore(source[f"{host}.weight"], grams[host], kept, damping)
                tensor = tensor.clone()
                tensor[:, columns] = restored[channels.to(restored.device)].to(tensor)
        yield name, tensor


def own_columns(anatomy: Anatomy, axis: str, plan: LayerPlan) -> tuple[list[int], list[int]]:
    """Return the host's columns that a layer takes from its own host, and their places in the student's matrix."""
    if axis == "f":
        return list(plan.neurons), list(range(len(plan.neurons)))
    size = anatomy.sizes.head_size
    heads = [(group.layer, head) for group in plan.groups for head in group.heads]
    own = [place for place, (layer, _) in enumerate(heads) if layer == plan.host]
    return (
        [heads[place][1] * size + i for place in own for i in range(size)],
        [place * size + i for place in own for i in range(size)],
    )
