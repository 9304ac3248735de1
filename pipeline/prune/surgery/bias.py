"""Biases that take over the mean output of what is removed (FLAP, 2312.11983): b' = b + W X̄ - W'_K X̄_K."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint
from pipeline.prune.second_order.hessian import projections
from pipeline.prune.second_order.restore import own_columns
from pipeline.prune.surgery.reinit import Stream


def biased_anatomy(anatomy: Anatomy) -> Anatomy:
    """Return the anatomy with every bias that its class can have.

    Raise ValueError if W_O or W_down cannot have one.
    """
    table = anatomy.family.layer
    required = [f"{module.removeprefix(anatomy.family.prefix)}.bias" for module in projections(anatomy).values()]
    missing = [name for name in required if name not in table] or ["W_O and W_down"] * (not required)
    if missing:
        raise ValueError(
            f"reinit.bias_compensation: model_type {anatomy.family.model_type!r} has no {' or '.join(missing)} to put "
            "mean outputs into; set it to false, and restore.outputs=true to restore by least squares instead"
        )
    return replace(anatomy, optional=anatomy.optional | {name for name in table if name.endswith(".bias")})


def biased_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of `biased_anatomy`."""
    return dict(config) | {"attention_bias": True, "mlp_bias": True}


def compensate_biases(
    anatomy: Anatomy, blueprint: Blueprint, source: Mapping[str, Tensor], means: Mapping[str, Tensor], stream: Stream
) -> Iterator[tuple[str, Tensor]]:
    """Yield a cut stream of tensors, of `biased_anatomy`, whose projections keep the mean outputs of the source.

    Weights that were changed before, by restoration, are accounted for. Biases that the source lacks start at zero. As
    in `restore_outputs`, donated heads neither compensate nor are compensated. Raise ValueError as `biased_anatomy`.
    """
    projected = {
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
        if kind == "weight" and module in projected:
            axis, pattern, plan = projected[module]
            host = pattern.format(layer=plan.host)
            kept, columns = own_columns(anatomy, axis, plan)
            whole = source[f"{host}.weight"].to(torch.float64)[channels] @ means[host]
            changes[bias] = whole - tensor[:, columns].to(torch.float64) @ means[host][kept]
        if kind == "bias" and name in changes:
            tensor = (tensor.to(torch.float64) + changes.pop(name)).to(tensor.dtype)
        yield name, tensor
        if kind == "weight" and bias in added:
            yield bias, changes.pop(bias, torch.zeros(len(tensor))).to(tensor.dtype)
