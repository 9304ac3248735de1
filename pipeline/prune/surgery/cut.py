"""Cutting: the student's tensors, streamed out of the source's, as a blueprint says.

Depth, hidden width, query heads, KV groups, neurons, vocabulary and cross-layer donation are this one function.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from pipeline.model.anatomy import EXPERT, Anatomy
from pipeline.model.blueprint import Blueprint, Group, LayerPlan
from pipeline.model.sizes import Axis, Segment, Sizes, joint

Donate = Callable[[str, Tensor, int, int], Tensor]  # (name with {layer}, donated rows, donor layer, host layer) -> rows


def as_it_is(name: str, rows: Tensor, donor: int, host: int) -> Tensor:
    """Return donated rows unchanged."""
    return rows


def cut(
    anatomy: Anatomy, blueprint: Blueprint, source: Mapping[str, Tensor], donate: Donate = as_it_is
) -> Iterator[tuple[str, Tensor]]:
    """Yield the student's checkpoint tensors by name, one at a time, in the source's dtype.

    `source` may be lazy: a tensor is read when it is needed and not kept. Raises ValueError if the blueprint does not
    fit. Where the model multiplies embeddings by sqrt(h), the narrowed embedding is scaled by sqrt(h / h') and, if it
    is the output matrix too, the final norm by sqrt(h' / h), so that narrowing changes no magnitude; tensors that the
    class divides by sqrt(h) are scaled by sqrt(h' / h).
    """
    student = blueprint.student(anatomy)
    kept = {"h": torch.tensor(blueprint.channels)}
    outer = kept | ({"v": torch.tensor(blueprint.vocabulary)} if blueprint.vocabulary else {})
    hosts = [plan.host for plan in blueprint.layers]
    width = len(blueprint.channels)
    narrowing = math.sqrt(width / anatomy.sizes.hidden)
    scale = math.sqrt(anatomy.sizes.hidden / width) if anatomy.family.embedding_times_root_hidden else 1.0
    for name, (segment,) in anatomy.outer_tensors.items():
        tensor = _selected(source[name], segment, outer | _of_layers(segment, anatomy.sizes, hosts))
        if name == anatomy.embedding:
            tensor = _scaled(tensor, scale, 0.0)
        elif name == anatomy.final_norm and anatomy.tied:
            tensor = _scaled(tensor, 1.0 / scale, anatomy.family.norm_offset)
        elif name == f"{anatomy.family.final_norm}.bias" and anatomy.tied:
            tensor = _scaled(tensor, 1.0 / scale, 0.0)
        elif name in anatomy.family.divided_by_root_hidden:
            tensor = _scaled(tensor, narrowing, 0.0)
        yield name, tensor
    for place, plan in enumerate(blueprint.layers):
        for name, segments in student.layer_tensors.items():
            if not student.has(name, place):
                continue
            origin = _origin(student, plan, name)
            parts = [
                _selected(_part(anatomy, source, origin, i, plan, donate), segment, kept)
                for i, segment in enumerate(segments)
            ]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts, joint(segments))
            if name.removeprefix(anatomy.family.prefix) in anatomy.family.divided_by_root_hidden:
                tensor = _scaled(tensor, narrowing, 0.0)
            yield name.format(layer=place), tensor


def _origin(student: Anatomy, plan: LayerPlan, name: str) -> str:
    """Return the source's name, with a `{layer}` place, of a layer tensor: experts are renumbered."""
    if not plan.experts or name not in student.expert_of:
        return name
    pattern, expert = student.expert_of[name]
    return pattern.replace(EXPERT, str(plan.experts[expert]))


def principal_layer(plan: LayerPlan) -> int:
    """Return the source layer of most of a layer's KV groups, its host if that is one of them.

    Gains over the head size (QK-norm) are shared by all heads of a layer, so they can follow one source only.
    """
    counts = {layer: sum(g.layer == layer for g in plan.groups) for layer in {g.layer for g in plan.groups}}
    return max(counts, key=lambda layer: (counts[layer], layer == plan.host, -layer))


def of_heads(axis: Axis) -> bool:
    """Whether an axis runs over query heads or KV groups."""
    return not {"n", "k"}.isdisjoint(axis.split())


def _part(
    anatomy: Anatomy, source: Mapping[str, Tensor], name: str, index: int, plan: LayerPlan, donate: Donate
) -> Tensor:
    """Return segment `index` of a layer tensor with heads, groups and neurons cut, hidden channels still whole."""
    segment = anatomy.layer_tensors[name][index]
    along = next((i for i, axis in enumerate(segment) if of_heads(axis)), None)
    if along is not None:
        pieces = []
        for layer, groups in groupby(plan.groups, key=lambda group: group.layer):
            kept = units(segment[along], anatomy.sizes, layer, list(groups))
            rows = _segment(anatomy, source, name, index, layer).index_select(along, kept)
            pieces.append(rows if layer == plan.host else donate(name, rows, layer, plan.host))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, along)
    layer = principal_layer(plan) if segment == ("d",) else plan.host
    if plan.merged and name in anatomy.routed:
        return _mean(anatomy, source, name, plan)
    tensor = _segment(anatomy, source, name, index, layer)
    if "e" in segment and plan.experts:
        tensor = tensor.index_select(segment.index("e"), torch.tensor(plan.experts))
    for i, axis in enumerate(segment):
        if "f" in axis.split():
            tensor = _of_neurons(tensor, i, axis, "f", anatomy.sizes.layers[layer].neurons, plan.neurons)
        elif "y" in axis.split() and plan.shared:
            tensor = _of_neurons(tensor, i, axis, "y", anatomy.sizes.carried["y"], plan.shared)
        elif "x" in axis.split() and plan.expert_neurons:
            width, own = anatomy.sizes.carried["x"], plan.expert_neurons
            if "e" in segment:  # the first dimension
                pairs = zip(tensor, own, strict=True)
                tensor = torch.stack([_of_neurons(each, i - 1, axis, "x", width, kept) for each, kept in pairs])
            else:
                expert = anatomy.expert_of[name][1]
                place = plan.experts.index(expert) if plan.experts else expert
                tensor = _of_neurons(tensor, i, axis, "x", width, own[place])
    return tensor


def _mean(anatomy: Anatomy, source: Mapping[str, Tensor], name: str, plan: LayerPlan) -> Tensor:
    """Return a tensor of experts, each the weighted mean of some, neuron by neuron, in float64, rounded once."""
    read = expert_tensors(anatomy, source, name, plan.host)
    if name in anatomy.expert_of:
        return _mean_of(anatomy, read, name, plan, plan.experts.index(anatomy.expert_of[name][1]))
    return torch.stack([_mean_of(anatomy, read, name, plan, place) for place in range(len(plan.merged))])


def _mean_of(anatomy: Anatomy, read: Callable[[int], Tensor], name: str, plan: LayerPlan, place: int) -> Tensor:
    """Return the mean of the experts that go into the one at `place`."""
    parts = plan.merged[place]
    orders = plan.aligned[place] if plan.aligned else [()] * len(parts)
    tensors = [reordered(anatomy, name, read(expert), order) for (expert, _), order in zip(parts, orders, strict=True)]
    weighted = [tensor.to(torch.float64) * share for tensor, (_, share) in zip(tensors, parts, strict=True)]
    return torch.stack(weighted).sum(0).to(tensors[0].dtype)


def expert_tensors(anatomy: Anatomy, source: Mapping[str, Tensor], name: str, layer: int) -> Callable[[int], Tensor]:
    """Return a function from an expert to its part of `name`, one of `anatomy.routed`, in a layer.

    A tensor of all experts is read here, once; the tensor of a single expert at each call.
    """
    if name not in anatomy.expert_of:
        return source[name.format(layer=layer)].__getitem__
    pattern = anatomy.expert_of[name][0]
    return lambda expert: source[pattern.replace(EXPERT, str(expert)).format(layer=layer)]


def expert_axes(anatomy: Anatomy, name: str) -> Segment:
    """Return the axes of one expert's part of a tensor, `name` being one of `anatomy.routed`."""
    (segment,) = anatomy.layer_tensors[name]
    return segment if name in anatomy.expert_of else segment[1:]


def reordered(anatomy: Anatomy, name: str, tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Return one expert's part of a tensor with its neurons in an order; an empty one is their own."""
    for along, axis in enumerate(expert_axes(anatomy, name)):
        if order and "x" in axis.split():
            tensor = _of_neurons(tensor, along, axis, "x", anatomy.sizes.carried["x"], order)
    return tensor


def _of_neurons(tensor: Tensor, along: int, axis: Axis, letter: str, count: int, kept: Sequence[int]) -> Tensor:
    """Return what some of `count` neurons, the axis's `letter`, have in a dimension of a tensor."""
    each = tensor.shape[along] // count
    fastest = axis.split()[-1] == letter  # "2 f": whole blocks of all neurons; "f 2": pairs, neuron by neuron
    grid = torch.arange(tensor.shape[along]).view((each, -1) if fastest else (-1, each))
    return tensor.index_select(along, grid.index_select(int(fastest), torch.tensor(kept)).flatten())


def units(axis: Axis, sizes: Sizes, layer: int, groups: Sequence[Group]) -> Tensor:
    """Return the positions on a head axis (`n`, `n d`, `k d`, `k q+2 d`) of some bundles of a layer, in their order."""
    letters, widths = axis.split(), sizes.layers[layer]
    each = widths.each
    if letters[0] == "n":
        kept = torch.tensor([head for group in groups for head in group.heads])
    elif "q+2" in letters:
        kept = torch.tensor(
            [
                group.kv * (each + 2) + row
                for group in groups
                for row in (*(head - group.kv * each for head in group.heads), each, each + 1)
            ]
        )
    else:
        kept = torch.tensor([group.kv for group in groups])
    total = {"n": widths.heads, "k": widths.groups * (each + 2 if "q+2" in letters else 1)}[letters[0]]
    return torch.arange(sizes.length(axis, layer)).view(total, -1)[kept].flatten()


def _segment(anatomy: Anatomy, source: Mapping[str, Tensor], name: str, index: int, layer: int) -> Tensor:
    segments = anatomy.layer_tensors[name]
    tensor = source[name.format(layer=layer)]
    if len(segments) == 1:
        return tensor
    along = joint(segments)
    return tensor.split([anatomy.sizes.length(segment[along], layer) for segment in segments], along)[index]


def _selected(tensor: Tensor, segment: Segment, kept: Mapping[Axis, Tensor]) -> Tensor:
    """Return a tensor with the kept indices of each axis that `kept` names."""
    for place, axis in enumerate(segment):
        if axis in kept:
            tensor = tensor.index_select(place, kept[axis])
    return tensor


def _of_layers(segment: Segment, sizes: Sizes, hosts: Sequence[int]) -> dict[Axis, Tensor]:
    """Return what some layers have on each axis of a tensor that counts the layers first, as `L p` does."""
    count = len(sizes.layers)
    axes = [axis for axis in segment if axis.split()[0] == "L"]
    return {axis: torch.arange(sizes.length(axis, 0)).view(count, -1)[torch.tensor(hosts)].flatten() for axis in axes}


def _scaled(stored: Tensor, factor: float, offset: float) -> Tensor:
    """Scale a stored weight whose effective value is stored + offset, in float32 or better."""
    if factor == 1.0:
        return stored
    wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
    return ((wide + offset) * factor - offset).to(stored.dtype)
