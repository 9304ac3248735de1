"""A figure as a PNG, drawn by matplotlib."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Outline

from pipeline.report.drawing import COLOURS, Arc, Area, Box, Dot, Drawing, Line, Mark, Text


def save_png(drawing: Drawing, path: Path, scale: int = 2, margin: float = 14.0) -> None:
    """Write the drawing as a PNG of `scale` pixels per unit, with `margin` units of paper around it."""
    width, height = drawing.width + 2 * margin, drawing.height + 2 * margin
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor=COLOURS["paper"])
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-margin, drawing.width + margin), ylim=(drawing.height + margin, -margin))
    axes.axis("off")
    for order, mark in enumerate(drawing.marks):
        _png_mark(axes, mark, order)
    figure.savefig(path, dpi=100 * scale)


def _png_mark(axes, mark: Mark, order: int) -> None:
    colour = COLOURS[mark.role]
    points_per_pixel = 0.72
    match mark:
        case Box(x, y, width, height):
            face = {"facecolor": "none", "edgecolor": colour} if mark.outline else {"facecolor": colour, "linewidth": 0}
            shape = FancyBboxPatch((x, y), width, height, "square,pad=0", alpha=mark.opacity, zorder=order, **face)
            axes.add_patch(shape)
        case Line(points):
            style = (0, (3, 3)) if mark.dashed else "-"
            wide = mark.width * points_per_pixel
            axes.plot(*zip(*points), color=colour, linewidth=wide, linestyle=style, zorder=order)
        case Area(points):
            axes.add_patch(Polygon(points, closed=True, color=colour, alpha=mark.opacity, linewidth=0, zorder=order))
        case Arc(points):
            path = Outline(points, (Outline.MOVETO, *(Outline.CURVE4,) * 3))
            wide = mark.width * points_per_pixel
            axes.add_patch(PathPatch(path, facecolor="none", edgecolor=colour, linewidth=wide, zorder=order))
        case Dot(x, y, radius):
            inside = COLOURS["paper"] if mark.hollow else colour
            axes.add_patch(Circle((x, y), radius, facecolor=inside, edgecolor=colour, linewidth=1.1, zorder=order))
        case Text(x, y, text):
            side = {"start": "left", "middle": "center", "end": "right"}[mark.anchor]
            look = {"fontsize": mark.size * points_per_pixel * 0.94, "fontweight": "bold" if mark.bold else "normal"}
            axes.text(x, y, text, color=colour, ha=side, va="baseline", zorder=order, parse_math=False, **look)
