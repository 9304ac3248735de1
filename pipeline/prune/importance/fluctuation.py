"""Fluctuation (FLAP, 2312.11983): what varies little can go, because a bias can take its mean's place.

Score of input channel j of W_O or W_down: Var(X_j) · ‖W_:j‖², standardised within its layer and kind so that one
threshold serves the model; a bias then restores the mean output, b' = b + W X̄ - W'_K X̄_K.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint
from pipeline.model.families import LAYER
from pipeline.prune.importance.measure import Batch
from pipeline.prune.second_order.hessian import projections
from pipeline.prune.second_order.restore import own_columns
from pipeline.prune.surgery.reinit import Stream


@dataclass
class Moments:
    """Partial sums of one pass, float64, on the CPU: of x and of x² at each projection's input; they add over ranks."""

    inputs: dict[str, Tensor]  # by projection module name, [2, (n d)] or [2, f]
    tokens: Tensor  # [1]
    mask: Tensor | None = field(default=None, repr=False)  # of the batch under way, [batch, sequence]

    def tensors(self) -> list[Tensor]:
        """Give every sum, to be added over ranks in place."""
        return [*self.inputs.values(), self.tokens]

    def means(self) -> dict[str, Tensor]:
        """Give the mean input of each projection, by module name."""
        return {name: sums[0] / self.tokens for name, sums in self.inputs.items()}

    def variance(self, name: str) -> Tensor:
        """Give the variance of each input channel of a projection. ValueError if no token was seen."""
        if not int(self.tokens):
            raise ValueError("score.tokens: no calibration token was seen")
        first, second = self.inputs[name] / self.tokens
        return (second - first.square()).clamp(min=0.0)


@torch.no_grad()
def moments(model: nn.Module, anatomy: Anatomy, batches: Iterable[Batch]) -> Moments:
    """Give the first two moments of what W_O and W_down read; `model` maps ids [batch, sequence] to hidden states."""
    place = next(model.parameters()).device
    modules = dict(model.named_modules(prefix="model"))
    sums = Moments({}, torch.zeros(1, dtype=torch.float64))
    with ExitStack() as hooks:
        for layer in range(len(anatomy.sizes.layers)):
            for axis, module in projections(anatomy).items():
                name = module.format(layer=layer)
                sums.inputs[name] = torch.zeros(2, anatomy.sizes.length(axis, layer), dtype=torch.float64)
                hooks.callback(modules[name].register_forward_pre_hook(partial(_add, sums, sums.inputs[name])).remove)
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple) else (batch, None)
            sums.mask = None if mask is None else mask.to(place, torch.bool)
            sums.tokens += ids.numel() if mask is None else int(mask.sum())
            model(input_ids=ids.to(place), attention_mask=sums.mask, use_cache=False)
    return sums


def fluctuation(
    anatomy: Anatomy, source: Mapping[str, Tensor], seen: Moments
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Give Var(X_j) · ‖W_:j‖² per layer, of heads [n] (the mean over a head's channels) and of neurons [f]."""
    channels: dict[str, list[Tensor]] = {}
    for layer in range(len(anatomy.sizes.layers)):
        for axis, module in projections(anatomy).items():
            name = module.format(layer=layer)
            norms = source[f"{name}.weight"].to(torch.float64).square().sum(0)
            channels.setdefault(axis, []).append(seen.variance(name) * norms.cpu())
    heads = tuple(scores.unflatten(0, (-1, anatomy.sizes.head_size)).mean(1) for scores in channels["n d"])
    return heads, tuple(channels["f"])


def standardised(layers: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Give scores of each layer with mean zero and deviation one, zeros where they do not differ."""
    centred = (scores - scores.mean() for scores in layers)
    return tuple(scores / scores.std(correction=0).clamp(min=torch.finfo(scores.dtype).tiny) for scores in centred)


def biased_anatomy(anatomy: Anatomy) -> Anatomy:
    """Give the anatomy with every bias that its class can have; ValueError if W_O or W_down cannot have one."""
    table = anatomy.family.layer
    needed = [f"{module.removeprefix(LAYER)}.bias" for module in projections(anatomy).values()]
    missing = [name for name in needed if name not in table]
    if missing:
        raise ValueError(
            f"model_type {anatomy.family.model_type!r} has no {' or '.join(missing)} to put mean outputs into; "
            "restore by least squares instead"
        )
    return replace(anatomy, optional=anatomy.optional | {name for name in table if name.endswith(".bias")})


def biased_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give the config.json of `biased_anatomy`."""
    return dict(config) | {"attention_bias": True, "mlp_bias": True}


def compensate_biases(
    anatomy: Anatomy, blueprint: Blueprint, source: Mapping[str, Tensor], means: Mapping[str, Tensor], stream: Stream
) -> Iterator[tuple[str, Tensor]]:
    """Yield a cut stream, of `biased_anatomy`, whose projections write the mean output they wrote in the source.

    Whatever was done to a weight before (restoration) is accounted for. Biases the source lacks begin at zero. As in
    `restore_outputs`, donated heads neither compensate nor are compensated. ValueError as `biased_anatomy`.
    """
    written = {
        module.format(layer=place): (axis, module, plan)
        for place, plan in enumerate(blueprint.layers)
        for axis, module in projections(anatomy).items()
    }
    missing = biased_anatomy(anatomy).layer_tensors.keys() - anatomy.layer_tensors.keys()
    added = {name.format(layer=place) for name in missing for place in range(len(blueprint.layers))}
    channels = torch.tensor(blueprint.channels)
    changes: dict[str, Tensor] = {}
    for name, tensor in stream:
        module, _, kind = name.rpartition(".")
        bias = f"{module}.bias"
        if kind == "weight" and module in written:
            axis, pattern, plan = written[module]
            host = pattern.format(layer=plan.host)
            kept, columns = own_columns(anatomy, axis, plan)
            whole = source[f"{host}.weight"].to(torch.float64)[channels] @ means[host]
            changes[bias] = whole - tensor[:, columns].to(torch.float64) @ means[host][kept]
        if kind == "bias" and name in changes:
            tensor = (tensor.to(torch.float64) + changes.pop(name)).to(tensor.dtype)
        yield name, tensor
        if kind == "weight" and bias in added:
            yield bias, changes.pop(bias, torch.zeros(len(tensor))).to(tensor.dtype)


def _add(sums: Moments, total: Tensor, module: nn.Module, inputs: tuple) -> None:
    values = inputs[0] if sums.mask is None else inputs[0] * sums.mask.unsqueeze(-1)
    wide = values.flatten(0, -2).to(torch.promote_types(values.dtype, torch.float32))
    total += torch.stack([wide.sum(0), wide.square().sum(0)]).to(total)
