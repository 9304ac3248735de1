"""Projectors of image-text models, whose output follows the hidden channels of the text half."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pipeline.model.blueprint import Blueprint
from pipeline.model.families import Wrapper


def narrowed(wrapper: Wrapper, tensors: Mapping[str, Tensor], blueprint: Blueprint) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors beside the text half of a student: those over hidden channels have the kept ones.

    A class that gives its projector as many units as the text half has hidden channels keeps those of the largest
    products of norms, of what a unit reads and of what it writes to kept channels.
    """
    channels = torch.tensor(blueprint.channels)
    kept = {"h": channels, "u": kept_units(wrapper, tensors, channels)}
    for name, tensor in tensors.items():
        for dimension, axis in enumerate(wrapper.axes(name) or ()):
            if axis in kept:
                tensor = tensor.index_select(dimension, kept[axis])
        yield name, tensor


def kept_units(wrapper: Wrapper, tensors: Mapping[str, Tensor], channels: Tensor) -> Tensor:
    """Return the units of a projector that stay, ascending, as many as channels stay; none where it has no such axis.

    The score of a unit is ‖what it reads‖ · ‖what it writes to the kept channels‖.
    """
    score = torch.ones(())
    for name, tensor in tensors.items():
        axes = wrapper.axes(name) or ()
        if "u" in axes and len(axes) > 1:
            rows = tensor.double().movedim(axes.index("u"), 0)
            rows = rows.index_select(1, channels) if "h" in axes else rows
            score = score * rows.norm(dim=1)
    return score.argsort(descending=True, stable=True)[: len(channels)].sort().values if score.ndim else channels[:0]


def rotated_tensors(wrapper: Wrapper, tensors: Mapping[str, Tensor], basis: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors beside the text half, hidden channels rotated by a basis [h, h] in float64."""
    for name, tensor in tensors.items():
        axes = wrapper.axes(name) or ()
        if "h" in axes:
            wide = tensor.double().movedim(axes.index("h"), -1) @ basis.double()
            tensor = wide.movedim(-1, axes.index("h")).to(tensor.dtype).contiguous()
        yield name, tensor


def check_layers(wrapper: Wrapper, injected: int, blueprint: Blueprint) -> None:
    """Raise ValueError unless a student keeps, as its first, the layers that image features enter at."""
    hosts = [plan.host for plan in blueprint.layers[:injected]]
    if hosts != list(range(injected)):
        raise ValueError(
            f"plan.keep_first: image features of model_type {wrapper.model_type!r} enter at its first {injected} "
            f"layers, and the student begins with layers {hosts}; set plan.keep_first={injected}"
        )
