"""Second moments in one calibration pass: of what W_O and W_down read, and of the directions the residual stream takes.

Least-squares restoration, greedy removal and the principal basis need nothing else from the data.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy

BLOCK = 384  # columns of a product that are multiplied with all that follow them
CHUNK = 4096  # rows whose products add in float32 before they join the float64 total


@dataclass
class Grams:
    """Partial sums of one pass, float64, on the CPU once collected; they add over batches and ranks.

    Memory: 8 bytes times (n d)² + f² for every layer watched, plus 2 h² for the stream.
    """

    inputs: dict[str, Tensor]  # H = Σ x xᵀ by projection module, [(n d), (n d)] for W_O and [f, f] for W_down
    stream: Tensor | None  # Σ u uᵀ [h, h], u = x / rms(x) at every pre-norm and the final norm
    final: Tensor | None  # its share of the final norm [h, h]

    def tensors(self) -> list[Tensor]:
        """Return every sum, to be added over ranks in place."""
        return [*self.inputs.values(), *(x for x in (self.stream, self.final) if x is not None)]


@torch.no_grad()
def gram(
    model: nn.Module, anatomy: Anatomy, batches: Iterable[Tensor], layers: Sequence[int], *, stream: bool
) -> Grams:
    """Return the Gram matrices H = XᵀX at the inputs of W_O and W_down of some layers, and, on request, of the stream.

    `model` maps ids [batch, sequence] to hidden states. Where all layers' matrices do not fit in memory, make several
    passes over subsets of `layers`. Products are float32 within a chunk of rows, float64 where the model is.
    """
    place = next(model.parameters()).device
    home = with_float64(place)

    def zeros(*lengths: int) -> Tensor:
        return torch.zeros(lengths, dtype=torch.float64, device=home)

    widths = {
        module.format(layer=layer): anatomy.sizes.length(axis, layer)
        for layer in layers
        for axis, module in projections(anatomy).items()
    }
    stream_sums = [zeros(anatomy.sizes.hidden, anatomy.sizes.hidden) if stream else None for _ in range(2)]
    inputs = {name: zeros(width, width) for name, width in widths.items()}
    grams = Grams(inputs, *stream_sums)
    with ExitStack() as hooks:
        _watch(model, anatomy, grams, hooks)
        for ids in batches:
            model(input_ids=ids.to(place), use_cache=False)
    grams.inputs = {name: total.cpu() for name, total in grams.inputs.items()}
    grams.stream, grams.final = (None if total is None else total.cpu() for total in (grams.stream, grams.final))
    return grams


def projections(anatomy: Anatomy) -> dict[str, str]:
    """Return the `{layer}` module names of the projections that write to the stream, by the axis they read: W_O (`n d`)
    and W_down (`f`), without that of an axis which the family carries whole.

    ValueError for a family whose matrices are stored [in, out].
    """
    if anatomy.family.transposed:
        raise ValueError(
            f"model_type {anatomy.family.model_type!r} stores its matrices [in, out], which Hessians, FLAP and bias "
            "compensation do not read; choose score.kind=activation or taylor without them"
        )
    fixed = anatomy.family.fixed
    writers = {axis: anatomy.writer(axis) for axis, name in (("n d", "heads"), ("f", "neurons")) if name not in fixed}
    return {axis: module for axis, module in writers.items() if module is not None}


def need_projections(anatomy: Anatomy, setting: str, remedy: str) -> None:
    """Raise ValueError, naming a setting, where a family has no W_O and W_down of its own, as mixtures of experts."""
    missing = [name for axis, name in (("n d", "heads"), ("f", "neurons")) if axis not in projections(anatomy)]
    if missing:
        raise ValueError(
            f"{setting}: model_type {anatomy.family.model_type!r} keeps its {' and '.join(missing)}, of which this "
            f"chooses; set {remedy}"
        )


def with_float64(place: torch.device) -> torch.device:
    """Return the device where float64 sums for a model on `place` live: its own, or the CPU."""
    return torch.device("cpu") if place.type in ("npu", "mps") else place


def add_products(total: Tensor, rows: Tensor) -> None:
    """Add XᵀX of rows [..., width] to a total [width, width], chunk by chunk; what is symmetric is multiplied once."""
    for part in rows.flatten(0, -2).split(CHUNK):
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        product = wide.new_zeros(total.shape)
        for first in range(0, len(product), BLOCK):
            block = slice(first, first + BLOCK)
            product[block, first:] = wide[:, block].T @ wide[:, first:]
        upper = product.triu().to(total.device, total.dtype)
        total += upper + upper.triu(1).T


def _watch(model: nn.Module, anatomy: Anatomy, grams: Grams, hooks: ExitStack) -> None:
    modules = dict(model.named_modules(prefix=anatomy.family.decoder))
    for name, total in grams.inputs.items():
        hooks.callback(modules[name].register_forward_pre_hook(partial(_input, total)).remove)
    if grams.stream is None or grams.final is None:
        return
    layers = range(len(anatomy.sizes.layers))
    prefixes = [anatomy.family.prefix.format(layer=layer) for layer in layers]
    readers = [f"{prefix}{norm}" for prefix in prefixes for norm in anatomy.family.pre_norms]
    last = anatomy.family.final_norm
    sums = {name: [grams.stream] for name in readers} | {last: [grams.stream, grams.final]}
    for name, totals in sums.items():
        hooks.callback(modules[name].register_forward_pre_hook(partial(_direction, totals)).remove)


def _input(total: Tensor, module: nn.Module, inputs: tuple) -> None:
    add_products(total, inputs[0])


def _direction(totals: list[Tensor], module: nn.Module, inputs: tuple) -> None:
    wide = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    for total in totals:
        add_products(total, unit)
