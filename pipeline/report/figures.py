"""The report's figures, each a drawing made from plain values."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.model.blueprint import Blueprint
from pipeline.model.scores import Scores
from pipeline.model.sizes import Sizes
from pipeline.report.anatomy_map import anatomy_map, fate
from pipeline.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, legend, number, panel, scale
from pipeline.report.drawing import Area, Box, Dot, Drawing, Line, Mark, Text
from pipeline.report.expert_map import expert_map
from pipeline.report.facts import Curve, faster, times, widths

BARS = 120
GONE = 1e9  # a perplexity far above that of any vocabulary: larger ones are drawn at the edge
NAMED = 4  # cuts whose names have room beside their lines


def cut_figures(sizes: Sizes, blueprint: Blueprint, scores: Scores) -> dict[str, Drawing]:
    """Return the figures of the cut: the maps, the importance of layers and of hidden channels."""
    experts = {"experts": expert_map(blueprint, scores)} if any(map(len, scores.experts)) else {}
    return experts | {
        "map": anatomy_map(sizes, blueprint, scores),
        "layers": layer_importance(scores, fate(blueprint).hosts),
        "channels": channel_importance(scores, frozenset(blueprint.channels)),
    }


def layer_importance(scores: Scores, hosts: frozenset[int]) -> Drawing:
    """Draw one stem per layer, its block influence on a logarithmic axis; hollow where the layer was removed."""
    values = [max(float(value), 1e-6) for value in scores.layers]
    x = Scale(-0.7, len(values) - 0.3, LEFT, WIDTH - RIGHT)
    y = scale(values, HEIGHT - BOTTOM, TOP, log=True)
    marks = panel("Influence of each layer", x, y, "layer", x_ticks=6)
    for layer, value in enumerate(values):
        kept = layer in hosts
        role = "kept" if kept else "muted"
        tip = f"layer {layer}: {value:.4f}, {'kept' if kept else 'removed'}"
        marks.append(Line(((x(layer), y.start), (x(layer), y(value))), role, 1.4, dashed=not kept))
        marks.append(Dot(x(layer), y(value), min(3.4, 110 / len(values)), role, tip, hollow=not kept))
    keys = [("kept", lambda a, b: Dot(a + 4, b, 3.4, "kept"))]
    if len(hosts) < len(values):
        keys.append(("removed", lambda a, b: Dot(a + 4, b, 3.4, "muted", hollow=True)))
    marks += legend(keys, LEFT, 26)
    dropped = [layer for layer in range(len(values)) if layer not in hosts]
    summary = f"removed: {', '.join(map(str, dropped))}" if dropped else "none removed"
    return Drawing(WIDTH, HEIGHT, f"Influence of each of {len(values)} layers, logarithmic; {summary}.", tuple(marks))


def channel_importance(scores: Scores, kept: frozenset[int]) -> Drawing:
    """Draw the hidden channels from the most to the least important, in bins; the removed share of a bin is grey."""
    order = scores.channels.argsort(descending=True).tolist()
    mean = float(scores.channels.double().mean())
    count = len(order)
    bars = min(count, BARS)
    bins = [order[i * count // bars : (i + 1) * count // bars] for i in range(bars)]
    heights = [max(float(scores.channels[bin_].double().mean()) / mean, 1e-6) for bin_ in bins]
    x = Scale(0, count, LEFT, WIDTH - RIGHT)
    y = scale(heights, HEIGHT - BOTTOM, TOP, log=True)
    title = "Importance of hidden channels"
    marks = panel(title, x, y, f"{count} channels, most important first; mean = 1")
    start = 0
    for bin_, height in zip(bins, heights):
        inside = sum(channel in kept for channel in bin_)
        left, right = x(start), x(start + len(bin_))
        tip = f"ranks {start + 1}–{start + len(bin_)}: {height:.2f} of the mean score, {inside} of {len(bin_)} kept"
        tall = y.start - y(height)
        share = tall * inside / len(bin_)
        marks.append(Box(left, y(height), right - left + 0.1, tall, "removed", tip))
        marks.append(Box(left, y.start - share, right - left + 0.1, share, "kept", tip))
        start += len(bin_)
    if len(kept) < count:
        keys = [(role, lambda a, b, role=role: Box(a, b - 5, 9, 9, role)) for role in ("kept", "removed")]
        marks += legend(keys, LEFT, 26)
    return Drawing(WIDTH, HEIGHT, f"{title}, sorted; {len(kept)} of {count} are kept.", tuple(marks))


def curve(
    title: str, points: Curve, x_label: str, subtitle: str, dots: bool = False, cuts: Sequence[tuple[float, str]] = ()
) -> Drawing:
    """Draw one curve on an axis from zero, with `subtitle` above it; with `dots` its points are marked.

    `cuts` are positions on the x axis, each with a name, marked by a dashed line.
    """
    points = thinned(points, 240)
    xs, values = [p[0] for p in points], [p[1] for p in points]
    x = Scale(min(0.0, *xs), max(xs) if max(xs) > 0 else 1.0, LEFT, WIDTH - RIGHT)
    y = scale(values, HEIGHT - BOTTOM, TOP + 2, zero=True)
    marks = panel(title, x, y, x_label)
    for place, name in cuts:
        marks.append(Line(((x(place), y.start), (x(place), y.end)), "muted", 1.0, dashed=True, tip=f"{name} begins"))
        if len(cuts) <= NAMED:
            marks.append(Text(x(place) + 4, y.start - 6, name, size=9.5))
    places = tuple((x(a), y(b)) for a, b in points)
    marks.append(Area((*places, (places[-1][0], y.start), (places[0][0], y.start)), "kept", 0.10))
    marks.append(Line(places, "kept", 1.8))
    if dots:
        marks += [Dot(*place, 3.0, "kept", f"{number(a)}: {b:.4g}") for place, (a, b) in zip(places, points)]
    else:
        marks.append(Dot(*places[-1], 3.0, "kept", f"{number(xs[-1])}: {values[-1]:.4g}"))
    marks.append(Text(LEFT, 30, subtitle, size=10.5))
    alt = f"{title}: from {values[0]:.4g} to {values[-1]:.4g} over {number(xs[-1])} {x_label}."
    return Drawing(WIDTH, HEIGHT, alt, tuple(marks))


def shapes_searched(search: Mapping[str, Any]) -> Drawing:
    """Draw the shapes of search.json: predicted speed over the teacher's, and loss over the lowest right after cutting.

    The Pareto front is filled and joined, other shapes are hollow, and the selected shape is ringed.
    """
    found = faster(search)
    lowest = min(each["loss"] for each, _ in found)
    x = scale([speed for _, speed in found], LEFT, WIDTH - RIGHT)
    y = scale([each["loss"] - lowest for each, _ in found], HEIGHT - BOTTOM, TOP + 2)
    marks = panel(
        "Shapes cut and measured", x, y, f"{search['serving']['speed']} speed, times the teacher's (predicted)"
    )
    marks.append(Text(LEFT, 30, f"nats over the lowest loss, {lowest:.3f}", size=10.5))
    places = {id(each): (x(speed), y(each["loss"] - lowest)) for each, speed in found}
    marks.append(Line(tuple(places[id(each)] for each, _ in found if each["front"]), "kept", 1.4))
    for each, speed in found:
        role = "kept" if each["front"] else "muted"
        tip = f"{widths(each['shape'])}: {speed:.2f} times, loss {each['loss']:.3f}"
        if each["shape"] == search["picked"]:  # first, as a ring is filled with paper
            marks.append(Dot(*places[id(each)], 7.0, "donated", f"selected: {tip}", hollow=True))
        marks.append(Dot(*places[id(each)], 3.4, role, tip, hollow=not each["front"]))
    alt = f"{len(found)} shapes by predicted speed and loss after cutting; selected: {widths(search['picked'])}."
    return Drawing(WIDTH, HEIGHT, alt, tuple(marks))


def thinned(points: Curve, most: int) -> Curve:
    """Return at most `most` points: means of equally long stretches."""
    if len(points) <= most:
        return points
    parts = [points[i * len(points) // most : (i + 1) * len(points) // most] for i in range(most)]
    return [tuple(sum(column) / len(part) for column in zip(*part)) for part in parts]


def perplexities(domains: Mapping[str, Mapping[str, float]], start: str = "before recovery") -> Drawing:
    """Draw, for each evaluation text, the perplexity of teacher, start and student on one logarithmic axis.

    `domains` maps a text's name to {"teacher", "start", "student"} -> perplexity; `start` names that state, which may
    be absent. Values beyond GONE are drawn at GONE.
    """
    step, top = 46.0, 46.0
    shown = {name: {who: min(value, GONE) for who, value in row.items()} for name, row in domains.items()}
    x = scale([value for row in shown.values() for value in row.values()], 8, WIDTH - 12, log=True)
    floor = top + step * len(domains)
    marks: list[Mark] = [Text(0, 14, "Perplexity, lower is better", "ink", 12.5, bold=True)]
    for value in x.ticks(5):
        marks.append(Line(((x(value), top), (x(value), floor)), "grid"))
        marks.append(Text(x(value), floor + 15, number(value), anchor="middle", size=10.5))
    for i, (name, row) in enumerate(domains.items()):
        y = top + step * i + 32
        marks.append(Text(0, y - 14, name, "ink", 11))
        marks.append(Line(((x(x.low), y), (x(x.high), y)), "grid"))
        at = {who: x(value) for who, value in shown[name].items()}
        if "start" in row:
            marks.append(Line(((at["start"], y), (at["student"], y)), "kept", 2.2))
            tip = f"{name}, {start}: {times(row['start'])}"
            marks.append(Dot(at["start"], y, 4.2, "kept", tip, hollow=True))
        marks.append(Dot(at["student"], y, 4.6, "kept", f"{name}, student: {times(row['student'])}"))
        marks.append(Dot(at["teacher"], y, 4.6, "ink", f"{name}, teacher: {times(row['teacher'])}"))
    keys = [
        ("teacher", lambda a, b: Dot(a + 5, b, 4.2, "ink")),
        ("student", lambda a, b: Dot(a + 5, b, 4.2, "kept")),
    ]
    if any("start" in row for row in domains.values()):
        keys.append((start, lambda a, b: Dot(a + 5, b, 4.0, "kept", hollow=True)))
    marks += legend(keys, 0, 31)
    said = ((name, (f"{who} {times(value, '.4g')}" for who, value in row.items())) for name, row in domains.items())
    summary = "; ".join(f"{name}: {', '.join(each)}" for name, each in said)
    return Drawing(WIDTH, floor + 24, f"Perplexity. {summary}.", tuple(marks))


def stage_costs(stages: Mapping[str, Mapping[str, float]]) -> Drawing:
    """Draw one bar per stage: its seconds, with its peak_memory in bytes."""
    row, top, left = 24.0, 30.0, 74.0
    longest = max(stage["seconds"] for stage in stages.values()) or 1.0
    room = WIDTH - left - 118
    marks: list[Mark] = [Text(0, 14, "Time and peak memory of each stage", "ink", 12.5, bold=True)]
    for i, (name, stage) in enumerate(stages.items()):
        y = top + i * row
        summary = f"{duration(stage['seconds'])} · {stage['peak_memory'] / 1e9:.2f} GB"
        wide = max(1.0, room * stage["seconds"] / longest)
        marks.append(Text(left - 8, y + 13, name, "ink", 11, "end"))
        marks.append(Box(left, y + 4, wide, 12, "kept", f"{name}: {summary}"))
        marks.append(Text(left + wide + 6, y + 13.5, summary, size=10.5))
    summary = "; ".join(f"{name} {duration(stage['seconds'])}" for name, stage in stages.items())
    return Drawing(WIDTH, top + row * len(stages) + 4, f"Time of each stage: {summary}.", tuple(marks))


def duration(seconds: float) -> str:
    """Return a time as text in a readable unit."""
    if seconds < 0.1:
        return "< 0.1 s"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
