"""Static scales in the place of post-norms, fitted: one norm after another, each to what it gave in the model itself.

Pangu Light takes all scales from one pass over the model with its norms (`measure.inverse_rms`); what each of them gets
wrong then grows through the layers. Here a norm is fitted in the model whose earlier norms are scales already.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.forwards import replaced_forward
from pipeline.prune.passes.layerwise import Step, layers_of, recorded
from pipeline.prune.surgery.reinit import post_norm_modules

Sums = list[Tensor]  # of x y and of x², each [h], float64, on the CPU


@torch.no_grad()
def fitted_scales(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Iterable[Tensor],
    place: torch.device,
    add: Callable[[Sums], None],
) -> Iterator[tuple[str, Tensor]]:
    """Yield a scale [h], float64, for every post-norm module by name, in the order of the forward pass.

    v_c = Σ x_c y_c / Σ x_c² over tokens: y is what the norm gives in the model as it came, x what it would read in the
    model whose norms before it, that of its own layer's attention too, are their scales. `add` adds sums over ranks in
    place. `model` maps ids [batch, sequence] to hidden states and is left as it was. Time: four forward passes.
    Memory: on `place` one layer and one batch; on the model's own device four streams of all batches.
    """
    home = next(model.parameters()).device
    modules = dict(model.named_modules(prefix=anatomy.family.decoder))
    layers = layers_of(modules, anatomy)
    steps = recorded(model, layers, batches)
    whole = [step.twin() for step in steps]  # the model as it came
    for index, layer in enumerate(layers):
        layer.to(place)
        norms = anatomy.modules(anatomy.family.post_norms, index)
        wanted = [_outputs(step, layer, index, [modules[name] for name in norms], place) for step in whole]
        with ExitStack() as undo:
            for position, name in enumerate(norms):
                norm = modules[name]
                sums = [torch.zeros(anatomy.sizes.hidden, dtype=torch.float64) for _ in range(2)]
                for step, outputs in zip(steps, wanted, strict=True):
                    hook = norm.register_forward_pre_hook(partial(_add, sums, outputs[position]))
                    step.through(layer, index, place)
                    hook.remove()
                add(sums)
                scale = least_squares_scale(*sums)
                undo.enter_context(replaced_forward({norm: partial(_scaled, scale)}))
                yield name, scale
            for step in steps:
                step.advance(layer, index, place)
        layer.to(home)


def least_squares_scale(products: Tensor, squares: Tensor) -> Tensor:
    """Return the scale [h] of least Σ (v_c x_c - y_c)² from Σ x_c y_c and Σ x_c²; 1 where a channel was silent."""
    return torch.where(squares > 0, products / squares, 1.0)


def removed_scales(anatomy: Anatomy) -> dict[str, Tensor]:
    """Return scales of ones by post-norm module: norm and gain are simply gone (Pangu Light's baseline)."""
    return {name: torch.ones(anatomy.sizes.hidden, dtype=torch.float64) for name in post_norm_modules(anatomy)}


def _outputs(step: Step, layer: nn.Module, index: int, norms: list[nn.Module], place: torch.device) -> list[Tensor]:
    """Run the stream through a layer; return what its post-norms gave on the way, each [batch, sequence, h]."""
    home = step.hidden.device
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen[module] = output.to(home)

    with ExitStack() as hooks:
        for norm in norms:
            hooks.callback(norm.register_forward_hook(keep).remove)
        step.advance(layer, index, place)
    return [seen[norm] for norm in norms]


def _add(sums: Sums, wanted: Tensor, module: nn.Module, inputs: tuple) -> None:
    read = inputs[0]
    wide = torch.promote_types(read.dtype, torch.float32)
    x, y = (each.flatten(0, 1) for each in (read.to(wide), wanted.to(read.device, wide)))
    for total, values in zip(sums, (x * y, x.square()), strict=True):
        total += values.sum(0).to(total.device, total.dtype)


def _scaled(scale: Tensor, values: Tensor) -> Tensor:
    return values * scale.to(values)
