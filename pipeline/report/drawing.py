"""A figure as a value: marks in pixels, coloured by role; written as SVG for the page and as PNG by matplotlib.

Both writers draw the same marks, so the page and the files cannot disagree. In the SVG a role is a CSS variable and
follows the reader's light or dark theme; in the PNG it is a colour of the light theme. The palette is Okabe and Ito's,
which colour-blind readers can distinguish.
"""

from dataclasses import dataclass, field
from html import escape

COLOURS = {
    "paper": "#fffdf9",
    "ink": "#1d1b18",
    "muted": "#6d685f",
    "grid": "#e3ded4",
    "removed": "#d8d2c6",
    "kept": "#0072b2",
    "donated": "#d55e00",
}
Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle; with `outline` it is hollow."""

    x: float
    y: float
    width: float
    height: float
    role: str
    tip: str | None = None
    opacity: float = 1.0
    outline: bool = False


@dataclass(frozen=True)
class Line:
    """A polyline."""

    points: tuple[Point, ...]
    role: str
    width: float = 1.0
    dashed: bool = False
    tip: str | None = None


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: tuple[Point, ...]
    role: str
    opacity: float = 0.15


@dataclass(frozen=True)
class Arc:
    """A cubic curve from the first point to the last."""

    points: tuple[Point, Point, Point, Point]
    role: str
    width: float = 1.4
    tip: str | None = None


@dataclass(frozen=True)
class Dot:
    """A disc; with `hollow` a ring."""

    x: float
    y: float
    radius: float
    role: str
    tip: str | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Text:
    """A line of text on the baseline `y`; `anchor` is start, middle or end."""

    x: float
    y: float
    text: str
    role: str = "muted"
    size: float = 11.0
    anchor: str = "start"
    bold: bool = False


Mark = Box | Line | Area | Arc | Dot | Text


@dataclass(frozen=True)
class Drawing:
    """Marks on a canvas of `width` by `height` pixels, y downwards. `alt` says in words what it shows."""

    width: float
    height: float
    alt: str
    marks: tuple[Mark, ...] = field(repr=False)


def svg(drawing: Drawing) -> str:
    """Return the drawing as an SVG element for an HTML page that defines the colour variables."""
    size = f'viewBox="0 0 {drawing.width:g} {drawing.height:g}" width="{drawing.width:g}" height="{drawing.height:g}"'
    body = "".join(_svg_mark(mark) for mark in drawing.marks)
    return f'<svg {size} role="img" aria-label="{escape(drawing.alt)}">{body}</svg>'


def _svg_mark(mark: Mark) -> str:
    match mark:
        case Box(x, y, width, height):
            shape = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
            return _tipped("rect", f"{shape} {_paint(mark.role, mark.outline)}{_opacity(mark.opacity)}", mark.tip)
        case Line(points):
            dash = ' stroke-dasharray="3 3"' if mark.dashed else ""
            join = ' stroke-linejoin="round" stroke-linecap="round"' if len(points) > 2 else ""
            return _tipped("polyline", f'points="{_points(points)}" {_stroke(mark)}{dash}{join}', mark.tip)
        case Area(points):
            return f'<polygon points="{_points(points)}" class="f-{mark.role}"{_opacity(mark.opacity)}/>'
        case Arc((start, *rest)):
            path = f"M{_points((start,))}C{_points(tuple(rest))}"
            return _tipped("path", f'd="{path}" {_stroke(mark)}', mark.tip)
        case Dot(x, y, radius):
            shape = f'cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"'
            paint = f'class="s-{mark.role} f-paper" stroke-width="1.6"' if mark.hollow else f'class="f-{mark.role}"'
            return _tipped("circle", f"{shape} {paint}", mark.tip)
        case Text(x, y, text):
            weight = ' font-weight="600"' if mark.bold else ""
            where = f'x="{_n(x)}" y="{_n(y)}" font-size="{_n(mark.size)}" text-anchor="{mark.anchor}"'
            return f'<text {where}{weight} class="f-{mark.role}">{escape(text)}</text>'


def _tipped(tag: str, attributes: str, tip: str | None) -> str:
    return f"<{tag} {attributes}/>" if tip is None else f"<{tag} {attributes}><title>{escape(tip)}</title></{tag}>"


def _paint(role: str, outline: bool) -> str:
    return f'class="s-{role} f-none"' if outline else f'class="f-{role}"'


def _stroke(mark: Line | Arc) -> str:
    return f'class="s-{mark.role} f-none" stroke-width="{_n(mark.width)}"'


def _opacity(value: float) -> str:
    return "" if value == 1 else f' opacity="{value:.2f}"'


def _points(points: tuple[Point, ...]) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in points)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
