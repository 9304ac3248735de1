"""Which widths are searched: of W_O in whole KV groups and of W_down in neurons; the widths a search starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from pipeline.allocate.budgets import group_weights
from pipeline.allocate.evolution import Choice, spread
from pipeline.model.shape import Shape
from pipeline.model.sizes import Sizes


@dataclass(frozen=True)
class Site:
    """A projection whose width is searched, in units of `size` columns."""

    name: str
    layer: int
    kind: str  # attention | ffn
    heads: int  # of a KV group; 0 for ffn
    size: int
    most: int  # units
    least: int  # units that must stay, and the step between widths
    weights: int  # of a unit: in Q, K, V and O of a KV group, in gate, up and down of a neuron


def sites_of(sizes: Sizes, kept: Sequence[int], modules: Mapping[str, str], multiple: int) -> list[Site]:
    """Return the sites of the layers that stay, in the order of the stream.

    `modules` names W_O and W_down, with a place for the layer, by the axis they read (`n d`, `f`). Widths of
    neurons are multiples of `multiple`, or of its greatest common divisor with all widths, so that layers can exchange
    neurons.
    """
    sites = []
    least = gcd(multiple, *(sizes.layers[layer].neurons for layer in kept))
    for layer in kept:
        widths = sizes.layers[layer]
        each = widths.heads // widths.groups
        group = group_weights(sizes, widths)
        attention, ffn = (modules[axis].format(layer=layer) for axis in ("n d", "f"))
        sites.append(Site(attention, layer, "attention", each, each * sizes.head_size, widths.groups, 1, group))
        sites.append(Site(ffn, layer, "ffn", 0, 1, widths.neurons, least, 3 * sizes.hidden))
    return sites


def even_start(sites: Sequence[Site], weights: int) -> Choice:
    """Return widths that together hold at most `weights`, and as many of them as the step of neurons allows.

    Both kinds keep the same share, to whole KV groups, spread evenly over the layers; neurons use what groups leave.
    Raise ValueError if the least widths hold more.
    """
    share = weights / sum(site.most * site.weights for site in sites)
    widths: dict[str, int] = {}
    left = weights
    for kind in ("attention", "ffn"):
        some = [site for site in sites if site.kind == kind]
        low, most, step = sum(site.least for site in some), sum(site.most for site in some), some[0].least  # all alike
        wanted = round(share * most) if kind == "attention" else left // some[0].weights
        total = low + max(0, min(wanted, most) - low) // step * step
        chosen = spread(total, [site.most for site in some], step, step)
        widths |= {site.name: width for site, width in zip(some, chosen, strict=True)}
        left -= sum(site.weights * widths[site.name] for site in some)
    if left < 0:
        raise ValueError(f"budget.parameters: leaves the layers {weights} weights, {-left} too few; raise it")
    return tuple(widths[site.name] for site in sites)


def given_start(sites: Sequence[Site], shape: Shape) -> Choice:
    """Return for every site the width of a shape, or its own if less.

    Raise ValueError for a shape that keeps a part of the heads of a KV group.
    """
    each = {site.heads for site in sites if site.kind == "attention"}
    if each != {shape.heads // shape.groups}:
        raise ValueError(
            f"shape.heads: {shape.heads} for {shape.groups} groups; plan.widths=evolved keeps KV groups whole, "
            f"with {sorted(each)} heads: set shape.heads to that many times shape.groups, or use restore.sequential"
        )
    widths = {"attention": shape.groups, "ffn": shape.neurons}
    return tuple(min(widths[site.kind], site.most) for site in sites)
