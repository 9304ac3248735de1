"""Planning: from scores and widths to a blueprint, on the CPU, no model needed.

Depth by block influence, heads inside KV groups, KV groups with cross-layer donation (CLAP), neurons, channels
(Pangu Light 2505.20155, eq. 1-5).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy, LayerSizes
from pipeline.model.blueprint import Blueprint, Group, LayerPlan
from pipeline.model.scores import Scores


def plan(
    anatomy: Anatomy,
    scores: Scores,
    hosts: Sequence[int],
    widths: Sequence[LayerSizes],
    hidden: int,
    *,
    clap: bool,
    clap_normalise: bool = False,
) -> Blueprint:
    """Give the blueprint of a student whose layer i is hosted by source layer hosts[i] and has widths[i].

    With `clap`, the KV groups of every dropped layer compete with those of the nearest kept layer below it for its
    places (a run of dropped layers in one ranking, which equals folding them deepest first). A donor whose attention
    type differs from the host's, or whose KV groups have fewer query heads than the width asks of one, does not
    compete. `clap_normalise` divides scores by their layer's mean first.
    """
    ends = [*hosts[1:], len(anatomy.sizes.layers)]
    plans = []
    for host, end, width in zip(hosts, ends, widths, strict=True):
        dropped = range(host + 1, end) if clap else ()
        donors = [layer for layer in dropped if _competes(anatomy, layer, host, width)]
        groups = _groups(anatomy, scores, [host, *donors], width, clap_normalise)
        plans.append(LayerPlan(host, groups, _top(scores.neurons[host], width.neurons)))
    return Blueprint(_top(scores.channels, hidden), tuple(plans))


def plan_by(
    anatomy: Anatomy,
    scores: Scores,
    widths: Sequence[LayerSizes],
    hidden: int,
    layers: int,
    *,
    depth: str,
    keep_first: int,
    drawn: Sequence[str],
    seed: int,
    clap: bool,
    clap_normalise: bool = False,
    hosts: Sequence[int] | None = None,
) -> Blueprint:
    """Give the blueprint of a student of `layers` layers whose source layers would have these widths.

    The layers `hosts` stay, or those that `kept_layers` says; the kinds `drawn` (channels, heads, neurons) stay at
    random, by `seed`.
    """
    hosts = hosts or kept_layers(scores.layers, layers, depth, keep_first)
    scores = shuffled(scores, drawn, seed)
    own = [widths[host] for host in hosts]
    return plan(anatomy, scores, hosts, own, hidden, clap=clap, clap_normalise=clap_normalise)


def layers_that_stay(inputs: Mapping[str, Path], influence: Tensor, policy: Mapping[str, Any]) -> list[int]:
    """Give the layers that stay: those that a stage before the plan chose, else by block influence.

    `inputs` are folders of artifacts, the shape among them; `policy` says how influence chooses, and `keep_first`.
    """
    if "depth" in inputs:
        return json.loads((inputs["depth"] / "depth.json").read_text())["kept"]
    count = json.loads((inputs["shape"] / "shape.json").read_text())["layers"]
    return kept_layers(influence, count, policy["depth"], policy["keep_first"])


def kept_layers(influence: Tensor, count: int, policy: str, keep_first: int) -> list[int]:
    """Give the layers that stay, by block influence [layer] (eq. 4).

    `influence` drops the least influential ones, `contiguous` the run of least summed influence, `last` the deepest.
    The first `keep_first` layers always stay. ValueError if count is out of range.
    """
    total = len(influence)
    if not keep_first <= count <= total:
        raise ValueError(f"shape.layers is {count}; it must lie between {keep_first} (plan.keep_first) and {total}")
    drop = total - count
    if drop == 0:
        return list(range(total))
    if policy == "last":
        gone = set(range(count, total))
    elif policy == "contiguous":
        starts = range(keep_first, total - drop + 1)
        first = min(starts, key=lambda start: float(influence[start : start + drop].sum()))
        gone = set(range(first, first + drop))
    else:
        order = sorted(range(keep_first, total), key=lambda layer: (float(influence[layer]), -layer))
        gone = set(order[:drop])
    return [layer for layer in range(total) if layer not in gone]


def _competes(anatomy: Anatomy, donor: int, host: int, width: LayerSizes) -> bool:
    """Whether a dropped layer's KV groups can take places of a host of this width."""
    own = anatomy.sizes.layers[donor]
    alike = anatomy.layer_types[donor] == anatomy.layer_types[host]
    return alike and own.heads // own.groups >= width.heads // width.groups


def _groups(
    anatomy: Anatomy, scores: Scores, layers: Sequence[int], width: LayerSizes, normalise: bool
) -> tuple[Group, ...]:
    """Give the best bundles of some layers: heads pruned inside each group, groups scored by the mean of the heads
    that survive (eq. 5), one ranking over all the layers."""
    each = width.heads // width.groups
    ranked = []
    for layer in layers:
        source = anatomy.sizes.layers[layer]
        per_group = source.heads // source.groups
        if each > per_group:
            raise ValueError(
                f"shape.heads / shape.groups is {each}, but a KV group of layer {layer} has {per_group} heads"
            )
        values = scores.heads[layer].to(torch.float64).unflatten(0, (source.groups, per_group))
        if normalise:
            values = values / values.mean()
        best = values.topk(each, dim=1)
        for kv in range(source.groups):
            heads = tuple(sorted(kv * per_group + i for i in best.indices[kv].tolist()))
            ranked.append((float(best.values[kv].mean()), Group(layer, kv, heads)))
    if width.groups > len(ranked):
        raise ValueError(
            f"shape.groups is {width.groups}; layer {layers[0]} has {len(ranked)} KV groups to choose from"
        )
    ranked.sort(key=lambda entry: (-entry[0], entry[1].layer, entry[1].kv))
    chosen = [group for _, group in ranked[: width.groups]]
    return tuple(sorted(chosen, key=lambda group: (group.layer, group.kv)))


def _top(scores: Tensor, count: int) -> tuple[int, ...]:
    if count > len(scores):
        raise ValueError(f"the student asks for {count} of {len(scores)}; a student is never wider than its teacher")
    return tuple(sorted(scores.topk(count).indices.tolist()))


def leading(scores: Scores) -> Scores:
    """Give scores whose channels are kept in their order, the first before all others."""
    return replace(scores, channels=-torch.arange(len(scores.channels), dtype=torch.float64))


def shuffled(scores: Scores, kinds: Sequence[str], seed: int) -> Scores:
    """Give scores whose named kinds (`channels`, `heads`, `neurons`) are random: the control of every ablation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Tensor | tuple[Tensor, ...]):
        if isinstance(value, Tensor):
            return torch.rand(value.shape, generator=generator, dtype=torch.float64)
        return tuple(torch.rand(v.shape, generator=generator, dtype=torch.float64) for v in value)

    random = {kind: draw(getattr(scores, kind)) for kind in ("channels", "heads", "neurons") if kind in kinds}
    deviations = scores.deviations
    if deviations is not None:
        given = dict(zip(("heads", "neurons"), deviations, strict=True))
        drawn = {kind: torch.stack([v.std(correction=0) for v in random[kind]]) for kind in given if kind in random}
        deviations = torch.stack(list((given | drawn).values()))
    return replace(scores, **random, deviations=deviations)
