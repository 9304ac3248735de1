"""compare.html: several runs as one table, their trade-offs and their recovery, in the style of the report page."""

from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from urllib.parse import quote

from pipeline.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, number, panel, scale
from pipeline.report.compare import Point, cells, columns, front
from pipeline.report.comparison import count
from pipeline.report.drawing import Dot, Drawing, Line, Mark, Text
from pipeline.report.facts import times
from pipeline.report.figures import GONE
from pipeline.report.layout import panels, section
from pipeline.report.page import TEMPLATE, colour_rules

COSTS = {"parameters": "parameters of the student", "speedup": "decode speed, times the teacher's"}


def compare_page(points: Sequence[Point], links: Mapping[str, str], title: str) -> str:
    """Return the HTML page; `links`: run -> path of its report.html relative to the page, where there is one."""
    drawings = [trade_off(points, cost) for cost in COSTS if cost == "parameters" or _measured(points)]
    curves = recoveries(points)
    teachers = sorted({point.teacher for point in points})
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        kicker=escape(f"Pangu Light · {len(points)} runs of {', '.join(teachers)}"),
        heading=escape(title),
        lede=escape(_lede(points)),
        headline="",
        sections="\n".join(
            [
                section("Runs", _table(points, links)),
                section("Size, speed and quality", panels(drawings, _caption(points))),
                section("Recovery", panels([curves], "Held-out KL to the teacher. Numbers are those of the table."))
                if curves
                else "",
            ]
        ),
        footer="The same figures are in compare.json and compare.csv beside this page.",
        colours=colour_rules(),
    )


def _lede(points: Sequence[Point]) -> str:
    best = min(points, key=lambda point: point.quality)
    smallest = min(points, key=lambda point: point.parameters)
    text = f"Lowest perplexity: {best.name}, {times(best.quality, '.3f')} times the teacher’s at {best.size_ratio:.0%} "
    text += "of its parameters."
    if smallest != best:
        quality = times(smallest.quality, ".3f")
        text += f" Smallest student: {smallest.name}, {quality} times at {smallest.size_ratio:.0%}."
    return text


def _caption(points: Sequence[Point]) -> str:
    notes = [
        "Quality is the geometric mean over the held-out texts of perplexity over the teacher’s; lower is better. "
        "Numbers are those of the table; filled and joined: no other run is better in both."
    ]
    for kind, values in (("teachers", {p.teacher for p in points}), ("devices", {p.device for p in points})):
        if len(values) > 1:
            notes.append(f"The runs have different {kind} ({', '.join(sorted(values))}); ratios are not comparable.")
    if len({tuple(point.perplexities) for point in points}) > 1:
        notes.append("The runs were measured on different texts.")
    return " ".join(notes)


def _table(points: Sequence[Point], links: Mapping[str, str]) -> str:
    """Return one row a run, with a link to its report."""
    head = "".join(f"<th>{escape(column)}</th>" for column in ("run", *columns(points)))
    body = []
    for place, point in enumerate(points, 1):
        name = escape(point.name)
        if point.name in links:
            name = f'<a href="{escape(quote(links[point.name]))}">{name}</a>'
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells(point, points))
        body.append(f'<tr><th scope="row">{place}&ensp;{name}</th>{row}</tr>')
    rows = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll runs wide"><table>{rows}</table></div>'


def _measured(points: Sequence[Point]) -> bool:
    return all(point.speedup is not None for point in points)


def trade_off(points: Sequence[Point], cost: str) -> Drawing:
    """Draw quality against `cost`, parameters or speedup; the Pareto front is filled and joined."""
    value = {point.name: float(point.parameters if cost == "parameters" else point.speedup or 0.0) for point in points}
    height = {point.name: min(point.quality, GONE) for point in points}
    x = scale(list(value.values()), LEFT, WIDTH - RIGHT)
    y = scale(list(height.values()), HEIGHT - BOTTOM, TOP + 2, log=max(height.values()) > 10 * min(height.values()))
    marks: list[Mark] = panel("Perplexity, times the teacher's", x, y, COSTS[cost])
    best = front(points, cost)
    line = sorted((x(value[name]), y(height[name])) for name in best)
    if len(line) > 1:
        marks.append(Line(tuple(line), "kept", 1.4))
    for place, point in enumerate(points, 1):
        spot = x(value[point.name]), y(height[point.name])
        shown = count(point.parameters) if cost == "parameters" else f"×{value[point.name]:.2f}"
        tip = f"{place} {point.name}: {shown}, {times(point.quality, '.3f')} times the teacher's perplexity"
        marks.append(Dot(*spot, 4.0, "kept" if point.name in best else "muted", tip, hollow=point.name not in best))
        marks.append(_number(place, *spot))
    names = ", ".join(sorted(best))
    alt = f"{len(points)} runs by {COSTS[cost]} and perplexity relative to the teacher; front: {names}."
    return Drawing(WIDTH, HEIGHT, alt, tuple(marks))


def recoveries(points: Sequence[Point]) -> Drawing | None:
    """Draw the held-out KL of every run over recovery tokens; None where no run was recovered."""
    curves = {place: point for place, point in enumerate(points, 1) if point.recovery}
    if not curves:
        return None
    every = [pair for point in curves.values() for pair in point.recovery]
    x = scale([0.0, *(tokens for tokens, _ in every)], LEFT, WIDTH - RIGHT - 12, zero=True)
    y = scale([value for _, value in every], HEIGHT - BOTTOM, TOP + 2, zero=True)
    marks: list[Mark] = panel("Held-out KL, nats per token", x, y, "tokens")
    best = front(points, "parameters")
    ends: dict[int, tuple[float, float]] = {}
    for place, point in curves.items():
        role = "kept" if point.name in best else "muted"
        line = tuple((x(tokens), y(value)) for tokens, value in point.recovery)
        tip = f"{place} {point.name}: {number(point.recovery[0][1])} → {number(point.recovery[-1][1])}"
        marks += [Line(line, role, 1.6, tip=tip), Dot(*line[-1], 3.0, role, tip)]
        ends[place] = line[-1]
    lowest = HEIGHT
    for place, (right, down) in sorted(ends.items(), key=lambda end: -end[1][1]):  # numbers apart, from below
        lowest = min(down + 3.5, lowest - 11)
        marks.append(Text(right + 7, lowest, str(place), "ink", 10.5))
    return Drawing(WIDTH, HEIGHT, f"Held-out KL of {len(curves)} runs over recovery tokens.", tuple(marks))


def _number(place: int, x: float, y: float) -> Text:
    inside = x < WIDTH - RIGHT - 20
    return Text(x + 7 if inside else x - 7, y - 5, str(place), "ink", 10.5, "start" if inside else "end")
