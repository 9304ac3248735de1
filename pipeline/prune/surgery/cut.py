"""Cutting: the student's tensors, streamed out of the source's, as a blueprint says.

Depth, hidden width, query heads, KV groups, neurons and cross-layer donation are this one function.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby

import torch
from einops import rearrange
from torch import Tensor

from pipeline.model.anatomy import Anatomy, Segment
from pipeline.model.blueprint import Blueprint, LayerPlan
from pipeline.model.families import EMBEDDING, FINAL_NORM

Donate = Callable[[str, Tensor, int, int], Tensor]  # (name with {layer}, donated rows, donor layer, host layer) -> rows


def as_it_is(name: str, rows: Tensor, donor: int, host: int) -> Tensor:
    """Give donated rows unchanged."""
    return rows


def cut(
    anatomy: Anatomy, blueprint: Blueprint, source: Mapping[str, Tensor], donate: Donate = as_it_is
) -> Iterator[tuple[str, Tensor]]:
    """Yield the student's checkpoint tensors by name, one at a time, in the source's dtype.

    `source` may be lazy: a tensor is read when it is needed and not kept. Raises ValueError if the blueprint does not
    fit. Where the model multiplies embeddings by sqrt(h), the narrowed embedding is scaled by sqrt(h / h') and, if it
    is the output matrix too, the final gain by sqrt(h' / h), so that narrowing changes no magnitude.
    """
    blueprint.check(anatomy)
    channels = torch.tensor(blueprint.channels)
    scale = math.sqrt(anatomy.sizes.hidden / len(channels)) if anatomy.family.embedding_times_root_hidden else 1.0
    for name, (segment,) in anatomy.outer_tensors.items():
        kept = _on_hidden(source[name], segment, channels)
        if name == EMBEDDING:
            kept = _scaled(kept, scale, 0.0)
        elif name == FINAL_NORM and anatomy.tied:
            kept = _scaled(kept, 1.0 / scale, anatomy.family.norm_offset)
        yield name, kept
    for place, plan in enumerate(blueprint.layers):
        for name, segments in anatomy.layer_tensors.items():
            parts = [
                _on_hidden(_part(anatomy, source, name, i, plan, donate), segment, channels)
                for i, segment in enumerate(segments)
            ]
            yield name.format(layer=place), parts[0] if len(parts) == 1 else torch.cat(parts)


def principal_layer(plan: LayerPlan) -> int:
    """Give the source layer of most of a layer's KV groups, its host if that is one of them.

    Gains over the head size (QK-norm) are shared by all heads of a layer, so they can follow one source only.
    """
    counts = {layer: sum(g.layer == layer for g in plan.groups) for layer in {g.layer for g in plan.groups}}
    return max(counts, key=lambda layer: (counts[layer], layer == plan.host, -layer))


def _part(
    anatomy: Anatomy, source: Mapping[str, Tensor], name: str, index: int, plan: LayerPlan, donate: Donate
) -> Tensor:
    """Give segment `index` of a layer tensor with heads, groups and neurons cut, hidden channels still whole."""
    segments = anatomy.layer_tensors[name]
    segment = segments[index]
    if "n d" in segment or "k d" in segment:
        pieces = []
        for layer, groups in groupby(plan.groups, key=lambda group: group.layer):
            rows = _attention_rows(anatomy, _segment(anatomy, source, name, index, layer), segment, list(groups))
            pieces.append(rows if layer == plan.host else donate(name, rows, layer, plan.host))
        axis = next(i for i, axis in enumerate(segment) if axis in ("n d", "k d"))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
    layer = principal_layer(plan) if segment == ("d",) else plan.host
    tensor = _segment(anatomy, source, name, index, layer)
    if "f" in segment:
        tensor = tensor.index_select(segment.index("f"), torch.tensor(plan.neurons))
    return tensor


def _segment(anatomy: Anatomy, source: Mapping[str, Tensor], name: str, index: int, layer: int) -> Tensor:
    segments = anatomy.layer_tensors[name]
    tensor = source[name.format(layer=layer)]
    lengths = [anatomy.sizes.length(segment[0], layer) for segment in segments]
    return tensor if len(segments) == 1 else tensor.split(lengths)[index]


def _attention_rows(anatomy: Anatomy, tensor: Tensor, segment: Segment, groups: list) -> Tensor:
    """Give the rows (or columns) of the heads, or of the KV groups, of some bundles of one layer, in their order."""
    axis = next(i for i, axis in enumerate(segment) if axis in ("n d", "k d"))
    kept = [head for g in groups for head in g.heads] if segment[axis] == "n d" else [g.kv for g in groups]
    size = anatomy.sizes.head_size
    if axis == 0:
        return rearrange(rearrange(tensor, "(u d) ... -> u d ...", d=size)[kept], "u d ... -> (u d) ...")
    return rearrange(rearrange(tensor, "h (u d) -> h u d", d=size)[:, kept], "h u d -> h (u d)")


def _on_hidden(tensor: Tensor, segment: Segment, channels: Tensor) -> Tensor:
    return tensor.index_select(segment.index("h"), channels) if "h" in segment else tensor


def _scaled(stored: Tensor, factor: float, offset: float) -> Tensor:
    """Scale a stored weight whose effective value is stored + offset, in float32 or better."""
    if factor == 1.0:
        return stored
    wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
    return ((wide + offset) * factor - offset).to(stored.dtype)
