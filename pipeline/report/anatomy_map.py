"""The map of a cut: every layer, head and stretch of neurons of the teacher, and what became of it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.model.blueprint import Blueprint
from pipeline.model.scores import Scores
from pipeline.model.sizes import Sizes
from pipeline.report.axes import legend
from pipeline.report.drawing import Arc, Box, Dot, Drawing, Line, Mark, Text

LABEL, BIN, SHARE = 34.0, 4.0, 64.0  # pixels: layer numbers, one bin of neurons, the number at the end of a row
WIDTH = 736.0  # of the page's text


@dataclass(frozen=True)
class Fate:
    """What became of the parts of a teacher: where each head went, which neurons and layers stayed."""

    heads: dict[tuple[int, int], int]  # (layer, head) -> host layer; a head that is absent was removed
    neurons: dict[int, frozenset[int]]  # host layer -> kept neurons
    donations: dict[tuple[int, int], int]  # (donor layer, host layer) -> KV groups given (CLAP)

    @property
    def hosts(self) -> frozenset[int]:
        return frozenset(self.neurons)


def fate(blueprint: Blueprint) -> Fate:
    """Read a blueprint from the teacher's side."""
    bundles = [(plan.host, group) for plan in blueprint.layers for group in plan.groups]
    return Fate(
        {(group.layer, head): host for host, group in bundles for head in group.heads},
        {plan.host: frozenset(plan.neurons) for plan in blueprint.layers},
        dict(Counter((group.layer, host) for host, group in bundles if group.layer != host)),
    )


def anatomy_map(sizes: Sizes, blueprint: Blueprint, scores: Scores) -> Drawing:
    """Draw one row a layer of the teacher: its heads by KV group, its neurons in order, the share of score kept."""
    found = fate(blueprint)
    count = len(sizes.layers)
    row = 15.0 if count <= 48 else max(8.0, 720.0 / count)
    heads = max(widths.heads for widths in sizes.layers)
    cell = min(15.0, max(5.0, 300.0 // heads))
    heads_wide = max(heads * cell + (widths.groups - 1) * 4 for widths in sizes.layers)
    left = LABEL + max((_bulge(donor, host) for donor, host in found.donations), default=0.0)
    neurons_at = round(left + max(heads_wide, 106.0) + 24)
    bins = max(40, int((WIDTH - SHARE - neurons_at) // BIN))
    width = neurons_at + bins * BIN + SHARE
    top = 46.0
    marks: list[Mark] = [
        Text(0, top - 10, "layer", size=10.5),
        Text(left, top - 10, "heads, by KV group", size=10.5),
        Text(neurons_at, top - 10, "neurons, by index", size=10.5),
        Text(width, top - 10, "score kept", size=10.5, anchor="end"),
    ]
    for layer in range(count):
        y = top + layer * row
        kept = layer in found.hosts
        text = min(10.5, row * 0.78)
        name = Text(LABEL - 14, y + row * 0.5 + text * 0.35, str(layer), "ink" if kept else "muted", text, "end")
        marks.append(name)
        if not kept:
            marks.append(Line(((LABEL - 29, y + row / 2), (LABEL - 11, y + row / 2)), "muted", 1.0))
        marks += _heads(sizes, scores, found, layer, left, y, cell, row)
        marks += _neurons(sizes, scores, found, layer, neurons_at, y, bins, row)
    for (donor, host), groups in found.donations.items():
        marks += _donation(donor, host, groups, left - 5, top, row)
    marks += _legend(bool(found.donations), len(found.hosts) < count)
    return Drawing(width, top + count * row + 6, _alt(found, sizes), tuple(marks))


def _heads(sizes, scores, found: Fate, layer: int, left: float, y: float, cell: float, row: float) -> list[Mark]:
    widths = sizes.layers[layer]
    each = widths.each
    marks: list[Mark] = []
    for head in range(widths.heads):
        x = left + head * cell + (head // each) * 4
        host = found.heads.get((layer, head))
        score = float(scores.heads[layer][head] / scores.heads[layer].mean())
        tip = f"layer {layer}, head {head}, {score:.2f} of its layer's mean: "
        if host is None:
            marks.append(Box(x, y + 1, cell - 2, row - 2, "removed", tip + "removed"))
        elif host == layer:
            marks.append(Box(x, y + 1, cell - 2, row - 2, "kept", tip + "kept"))
        else:
            marks.append(Box(x, y + 1, cell - 2, row - 2, "donated", tip + f"donated to layer {host}"))
    return marks


def _neurons(sizes, scores, found: Fate, layer: int, x: float, y: float, bins: int, row: float) -> list[Mark]:
    width = bins * BIN
    total = sizes.layers[layer].neurons
    kept = found.neurons.get(layer, frozenset())
    if not kept:
        what = "its FFN is removed" if layer in found.hosts else "removed"
        tip = f"layer {layer}: {what}; its {total} neurons are removed"
        return [Box(x, y + 1, width, row - 2, "removed", tip)]
    share = float(scores.neurons[layer][sorted(kept)].sum() / scores.neurons[layer].sum())
    bins = min(bins, total)
    marks: list[Mark] = [Box(x, y + 1, width, row - 2, "removed")]
    for place in range(bins):
        start, end = place * total // bins, (place + 1) * total // bins
        inside = sum(neuron in kept for neuron in range(start, end))
        tip = f"layer {layer}, neurons {start}–{end - 1}: {inside} of {end - start} kept"
        part = width / bins
        marks.append(Box(x + place * part, y + 1, part, row - 2, "kept", tip, inside / (end - start)))
    text = min(10.5, row * 0.78)
    label = f"{share:.0%}" if len(kept) < total else "all"
    marks.append(Text(x + width + SHARE, y + row * 0.5 + text * 0.35, label, size=text, anchor="end"))
    return marks


def _donation(donor: int, host: int, groups: int, x: float, top: float, row: float) -> list[Mark]:
    start, end = (top + (layer + 0.5) * row for layer in (donor, host))
    bulge = x - _bulge(donor, host)
    tip = _given(donor, host, groups)
    return [
        Arc(((x, start), (bulge, start), (bulge, end), (x, end)), "donated", min(0.8 + 0.5 * groups, 2.8), tip),
        Dot(x, end, 2.6, "donated", tip),
    ]


def _given(donor: int, host: int, groups: int) -> str:
    return f"layer {donor} gives {groups} KV group{'s' * (groups > 1)} to layer {host}"


def _bulge(donor: int, host: int) -> float:
    return min(46.0, 14 + 6.0 * abs(donor - host))


def _legend(donated: bool, dropped: bool) -> list[Mark]:
    entries: list[tuple[str, Callable[[float, float], Mark]]] = [("kept", lambda x, y: Box(x, y - 5, 9, 9, "kept"))]
    if donated:
        entries.append(("donated to its host layer", lambda x, y: Box(x, y - 5, 9, 9, "donated")))
    entries.append(("removed", lambda x, y: Box(x, y - 5, 9, 9, "removed")))
    if dropped:
        entries.append(("layer removed", lambda x, y: Line(((x - 3, y), (x + 9, y)), "muted", 1.0)))
    return legend(entries, 0, 8)


def _alt(found: Fate, sizes: Sizes) -> str:
    dropped = sorted(set(range(len(sizes.layers))) - found.hosts)
    heads = sum(widths.heads for widths in sizes.layers)
    neurons = sum(widths.neurons for widths in sizes.layers)
    kept = sum(map(len, found.neurons.values()))
    given = "; ".join(_given(donor, host, n) for (donor, host), n in found.donations.items())
    layers = f"layers {', '.join(map(str, dropped))} are removed" if dropped else "no layer is removed"
    return (
        f"Map of the cut: {layers}; {len(found.heads)} of {heads} heads and {kept} of {neurons} neurons are kept"
        f"{'; ' + given if given else ''}."
    )
