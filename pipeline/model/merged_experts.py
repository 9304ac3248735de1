"""Experts that are means of several, in a student of a student: their members, shares and orders of neurons."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.model.blueprint import LayerPlan

Merged = tuple[tuple[tuple[int, float], ...], ...]  # as `LayerPlan` has them
Aligned = tuple[tuple[tuple[int, ...], ...], ...]


def composed_merges(host: "LayerPlan", plan: "LayerPlan") -> tuple[Merged, Aligned]:
    """Return the experts of the source, with their shares, that each expert of a composed plan is the mean of, and the
    orders of their neurons."""
    if not host.merged and not plan.merged:
        return (), ()
    kept = plan.experts or range(len(host.merged))
    means = plan.merged or tuple(((expert, 1.0),) for expert in kept)
    merged, aligned = [], []
    for place, each in enumerate(means):
        outer = plan.aligned[place] if plan.aligned else [()] * len(each)
        members = [(m, share * part, inner, order) for (expert, share), order in zip(each, outer)
                   for m, part, inner in _members(host, expert)]  # fmt: skip
        merged.append(tuple((member, share) for member, share, *_ in members))
        aligned.append(tuple(_ordered(inner, order) for *_, inner, order in members))
    return tuple(merged), tuple(aligned) if host.aligned or plan.aligned else ()


def _members(host: "LayerPlan", expert: int) -> list[tuple[int, float, tuple[int, ...]]]:
    """Return the experts of the source that an expert of a student is the mean of: index, share, order of neurons."""
    if not host.merged:
        return [(host.experts[expert] if host.experts else expert, 1.0, ())]
    orders = host.aligned[expert] if host.aligned else [()] * len(host.merged[expert])
    return [(member, part, order) for (member, part), order in zip(host.merged[expert], orders)]


def _ordered(inner: tuple[int, ...], outer: tuple[int, ...]) -> tuple[int, ...]:
    """Return the order of neurons that is `outer` of `inner`; an empty one is their own."""
    return tuple(inner[neuron] for neuron in outer) if inner and outer else inner or outer
