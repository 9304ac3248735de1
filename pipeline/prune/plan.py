"""Planning: from scores and widths to a blueprint, on the CPU, without a model.

Depth by block influence, heads inside KV groups, KV groups with cross-layer donation (CLAP), neurons, channels
(Pangu Light 2505.20155, eq. 1-5).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint, Group, LayerPlan
from pipeline.model.scores import Scores
from pipeline.model.shape import Depth, Shape, check_depth
from pipeline.model.sizes import LayerSizes

DRAWN = ("channels", "heads", "neurons", "experts")  # kinds of scores that can be replaced by random ones
# (block influence [layer], how many layers to remove, the layers that must stay) -> layers to remove
DepthPolicy = Callable[[Sequence[float], int, Collection[int]], set[int]]


def plan(
    anatomy: Anatomy,
    scores: Scores,
    hosts: Sequence[int],
    widths: Sequence[LayerSizes],
    hidden: int,
    *,
    clap: bool,
    clap_normalise: bool = False,
    experts: int | None = None,
    expert_neurons: int | None = None,
    shared_neurons: int | None = None,
) -> Blueprint:
    """Return the blueprint of a student whose layer i is hosted by source layer hosts[i] and has widths[i].

    With `clap`, the KV groups of every dropped layer compete with those of the nearest kept layer below it for its
    places (a run of dropped layers in one ranking, which equals folding them deepest first). A donor whose attention
    type differs from the host's, or whose KV groups have fewer query heads than the width asks of one, does not
    compete. `clap_normalise` divides scores by their layer's mean first.

    `experts`: how many stay in each layer that has any, those of the highest score; `expert_neurons`: how many
    neurons of each of them; `shared_neurons`: how many of the shared ones; None: all.
    """
    ends = [*hosts[1:], len(anatomy.sizes.layers)]
    plans = []
    for host, end, width in zip(hosts, ends, widths, strict=True):
        dropped = range(host + 1, end) if clap else ()
        donors = [layer for layer in dropped if _competes(anatomy, layer, host, width)]
        groups = _groups(anatomy, scores, [host, *donors], width, clap_normalise)
        own = kept_experts(anatomy, scores, host, experts) if experts is not None else ()
        inner: tuple[tuple[int, ...], ...] = ()
        if expert_neurons is not None and anatomy.sparse(host):
            stay = own or range(anatomy.sizes.carried["e"])
            inner = tuple(_top(scores.expert_neurons[host][expert], expert_neurons) for expert in stay)
        shared: tuple[int, ...] = ()
        if shared_neurons is not None and anatomy.sparse(host):
            shared = _top(scores.shared[host], shared_neurons)
        neurons = _top(scores.neurons[host], width.neurons)
        plans.append(LayerPlan(host, groups, neurons, own, inner, shared=shared))
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
    mixture: Mapping[str, int | None] = MappingProxyType({}),
) -> Blueprint:
    """Return the blueprint of a student of `layers` layers whose source layers would have these widths.

    The layers `hosts` stay, or those that `kept_layers` chooses. Of the kinds `drawn` (of `DRAWN`) random ones stay,
    drawn from `seed`. `mixture` holds how many experts and neurons of experts stay, as the arguments of `plan`.
    """
    hosts = hosts or kept_layers(scores.layers, layers, depth, anatomy.protected_layers(keep_first))
    scores = shuffled(scores, drawn, seed)
    own = [widths[host] for host in hosts]
    return plan(anatomy, scores, hosts, own, hidden, clap=clap, clap_normalise=clap_normalise, **mixture)


def kept_experts(anatomy: Anatomy, scores: Scores, layer: int, count: int) -> tuple[int, ...]:
    """Return the `count` experts of a layer of the highest score, equally many of each group that tokens are routed by.

    Empty where the layer has no experts, or all stay. Raise ValueError for a number that the class cannot have.
    """
    if anatomy.routing is None or not anatomy.sparse(layer):
        return ()
    most, groups = anatomy.sizes.carried["e"], anatomy.routing.groups
    anatomy.routing.check(count, most)
    if count == most:
        return ()
    best = scores.experts[layer].view(groups, -1).topk(count // groups, dim=1).indices
    first = torch.arange(groups)[:, None] * (most // groups)
    return tuple(sorted((best + first).flatten().tolist()))


def layers_that_stay(
    inputs: Mapping[str, Path], anatomy: Anatomy, influence: Tensor, policy: Mapping[str, Any]
) -> list[int]:
    """Return the layers that stay: those that an earlier stage chose, else those chosen by block influence.

    `inputs` are the folders of artifacts by name, with a shape; `policy` names the depth policy and `keep_first`.
    """
    if "depth" in inputs:
        return list(Depth.load(inputs["depth"]).kept)
    count = Shape.load(inputs["shape"]).layers
    return kept_layers(influence, count, policy["depth"], anatomy.protected_layers(policy["keep_first"]))


def kept_layers(influence: Tensor, count: int, policy: str, protected: Collection[int]) -> list[int]:
    """Return the `count` layers that stay, by block influence [layer] (eq. 4) and a policy of `DEPTH_POLICIES`.

    The layers `protected` always stay. Raise ValueError if `count` is out of range, the policy is unknown, or too
    few consecutive layers can be removed.
    """
    if policy not in DEPTH_POLICIES:
        raise ValueError(f"plan.depth: unknown policy {policy!r}; choose from {', '.join(DEPTH_POLICIES)}")
    total = len(influence)
    check_depth(count, total, protected)
    removed = DEPTH_POLICIES[policy](influence.tolist(), total - count, protected)
    return [layer for layer in range(total) if layer not in removed]


def least_influential(influence: Sequence[float], drop: int, protected: Collection[int]) -> set[int]:
    """Return the `drop` layers of least influence, of equal ones the deeper first."""
    order = sorted(_others(influence, protected), key=lambda layer: (influence[layer], -layer))
    return set(order[:drop])


def contiguous(influence: Sequence[float], drop: int, protected: Collection[int]) -> set[int]:
    """Return `drop` consecutive layers of least summed influence. ValueError where no such run may be removed."""
    runs = (range(start, start + drop) for start in range(len(influence) - drop + 1))
    free = [run for run in runs if not set(run) & set(protected)]
    if not free:
        raise ValueError(
            f"plan.depth=contiguous: no {drop} consecutive layers can be removed, since the layers {sorted(protected)} "
            "must stay; set plan.depth=influence"
        )
    return set(min(free, key=lambda run: sum(influence[layer] for layer in run)))


def deepest(influence: Sequence[float], drop: int, protected: Collection[int]) -> set[int]:
    """Return the last `drop` layers."""
    others = _others(influence, protected)
    return set(others[len(others) - drop :])


def _others(influence: Sequence[float], protected: Collection[int]) -> list[int]:
    return [layer for layer in range(len(influence)) if layer not in protected]


DEPTH_POLICIES: dict[str, DepthPolicy] = {
    "influence": least_influential,
    "contiguous": contiguous,
    "last": deepest,
}


def _competes(anatomy: Anatomy, donor: int, host: int, width: LayerSizes) -> bool:
    """Return whether a dropped layer's KV groups can take the places of a host of this width."""
    own = anatomy.sizes.layers[donor]
    if not width.groups or not own.groups:
        return False
    alike = anatomy.layer_types[donor] == anatomy.layer_types[host]
    movable = not {"heads", "groups"} & anatomy.family.fixed.keys()
    return movable and alike and own.each >= width.each


def _groups(
    anatomy: Anatomy, scores: Scores, layers: Sequence[int], width: LayerSizes, normalise: bool
) -> tuple[Group, ...]:
    """Return the best KV groups of `layers` in one ranking, each scored by the mean of its heads that survive (eq.
    5)."""
    if not width.groups:
        return ()
    each = width.each
    ranked = []
    for layer in layers:
        source = anatomy.sizes.layers[layer]
        per_group = source.each
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
        raise ValueError(f"the shape keeps {count} of {len(scores)} units; a student is never wider than its teacher")
    return tuple(sorted(scores.topk(count).indices.tolist()))


def leading(scores: Scores) -> Scores:
    """Return scores that rank channels by their index, the first highest."""
    return replace(scores, channels=-torch.arange(len(scores.channels), dtype=torch.float64))


def shuffled(scores: Scores, kinds: Sequence[str], seed: int) -> Scores:
    """Return scores whose named kinds, of `DRAWN`, are random: the control of every ablation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Tensor | tuple[Tensor, ...]):
        if isinstance(value, Tensor):
            return torch.rand(value.shape, generator=generator, dtype=torch.float64)
        return tuple(torch.rand(v.shape, generator=generator, dtype=torch.float64) for v in value)

    random = {kind: draw(getattr(scores, kind)) for kind in DRAWN if kind in kinds}
    deviations = scores.deviations
    if deviations is not None:
        given = dict(zip(("heads", "neurons"), deviations, strict=True))
        drawn = {kind: torch.stack([v.std(correction=0) for v in random[kind]]) for kind in given if kind in random}
        deviations = torch.stack(list((given | drawn).values()))
    return replace(scores, **random, deviations=deviations)
