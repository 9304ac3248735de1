"""Layer by layer: a projection is solved for the inputs that the pruned layers give (SlimGPT, Týr-the-Pruner).

Týr's supernet holds several candidates of every projection; the input of the next one is then their expectation
(2503.09657, eq. 5), Σ_e (1 - S_e) X_e / Σ_e (1 - S_e). Where a projection adds to the stream this is the output of the
weighted average weight, which is what `expected_weight` gives, for W_O and for W_down.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.prune.head_norms import alone
from pipeline.prune.passes.layerwise import layers_of, recorded
from pipeline.prune.second_order.hessian import add_products, projections, with_float64
from pipeline.prune.second_order.removal_order import Removal
from pipeline.prune.second_order.restore import DAMPING, restore

# (projection module name, weight [out, in], H [in, in] float64) -> weight [out, in] that its successors will live with
Prune = Callable[[str, Tensor, Tensor], Tensor]


@torch.no_grad()
def prune_in_sequence(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Iterable[Tensor],
    prune: Prune,
    place: torch.device,
    kept: Sequence[int] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that `prune` chose, by name, W_O and then W_down of each layer from the first to the last.

    `model` maps ids [batch, sequence] to hidden states and is left with these weights, gains that span all heads seeing
    those that W_O reads (`alone`). Of the layers `kept`, if given, the stream passes by all others. H is the Gram
    matrix of what the projection reads once all before it, W_O of its own layer too, have theirs, on `place` where that
    has float64; it is one rank's share, which `prune` adds over ranks. Time: three forward passes. Memory: on `place`
    one layer and one batch, on the model's own device the stream of all batches.
    """
    home = next(model.parameters()).device
    modules = dict(model.named_modules(prefix=anatomy.family.decoder))
    layers = layers_of(modules, anatomy)
    steps = recorded(model, layers, batches)
    for index in range(len(layers)) if kept is None else kept:
        layer = layers[index]
        layer.to(place)
        for axis, module in projections(anatomy).items():
            name = module.format(layer=index)
            width = anatomy.sizes.length(axis, index)
            total = torch.zeros(width, width, dtype=torch.float64, device=with_float64(place))
            for step in steps:
                hook = modules[name].register_forward_pre_hook(partial(_add, total))
                step.through(layer, index, place)
                hook.remove()
            weight = prune(name, modules[name].weight, total)
            modules[name].weight.copy_(weight)
            if axis == "n d":
                _narrow_gains(modules, anatomy, index, weight)
            yield f"{name}.weight", weight
        for step in steps:
            step.advance(layer, index, place)
        layer.to(home)


def expected_weight(weights: Iterable[Tensor], sparsities: Sequence[float]) -> Tensor:
    """Return Σ (1 - S_e) W_e / Σ (1 - S_e) in float64 of candidate weights [out, in] of sparsities S_e.

    Raise ValueError if all candidates are empty, S_e = 1.
    """
    shares = [1.0 - sparsity for sparsity in sparsities]
    if sum(shares) <= 0.0:
        raise ValueError(f"candidate sparsities are {list(sparsities)}; at least one must be below 1")
    terms = [share * weight.to(torch.float64) for share, weight in zip(shares, weights, strict=True)]
    return torch.stack(terms).sum(0) / sum(shares)


def at_width(weight: Tensor, gram: Tensor, removal: Removal, count: int, damping: float = DAMPING) -> Tensor:
    """Return weight [out, in] with the `count` units that stay longest restored exactly and zeros elsewhere,
    float64."""
    kept = torch.tensor(removal.kept(count), dtype=torch.int64)
    columns = columns_of(kept, weight.shape[1] // len(removal.order)).to(gram.device)
    whole = torch.zeros(weight.shape, dtype=torch.float64, device=gram.device)
    if len(columns):
        whole[:, columns] = restore(weight, gram, columns, damping)
    return whole


def columns_of(units: Tensor, size: int) -> Tensor:
    """Return the columns [units · size] of units of `size` consecutive ones, in the order of the units."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def _narrow_gains(modules: Mapping[str, nn.Module], anatomy: Anatomy, layer: int, weight: Tensor) -> None:
    """Restrict gains that span all heads to those of which W_O [h, n d] reads anything."""

    def parameter(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        return getattr(modules[module], kind)

    heads = weight.unflatten(1, (-1, anatomy.sizes.head_size)).ne(0).any(2).any(0).nonzero().flatten()
    for name, narrow in alone(anatomy, layer, heads, parameter):
        parameter(name).copy_(narrow)


def _add(total: Tensor, module: nn.Module, inputs: tuple) -> None:
    add_products(total, inputs[0])
