"""Local distillation of FFNs before recovery, as a figure and as a section of the page."""

from collections.abc import Mapping, Sequence

from pipeline.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, legend, panel, scale
from pipeline.report.drawing import Dot, Drawing, Line
from pipeline.report.facts import Report
from pipeline.report.layout import beside, section


def errors_by_layer(errors: Sequence[Mapping[str, float]]) -> Drawing:
    """Draw two dots per layer, on a logarithmic axis: its distance from the teacher before and after distillation."""
    pairs = [[max(each[when], 1e-6) for when in ("before", "after")] for each in errors]
    x = Scale(-0.7, len(errors) - 0.3, LEFT, WIDTH - RIGHT)
    y = scale([value for pair in pairs for value in pair], HEIGHT - BOTTOM, TOP, log=True)
    marks = panel("Distance from the teacher’s residual stream", x, y, "layer of the student", x_ticks=6)
    radius = min(3.4, 110 / len(errors))
    for each, (before, after) in zip(errors, pairs):
        place, tip = x(each["layer"]), f"layer {each['layer']}: {each['before']:.3g} → {each['after']:.3g}"
        marks.append(Line(((place, y(before)), (place, y(after))), "muted", 1.4))
        marks.append(Dot(place, y(before), radius, "muted", tip, hollow=True))
        marks.append(Dot(place, y(after), radius, "kept", tip))
    keys = [
        ("after pruning", lambda a, b: Dot(a + 4, b, 3.4, "muted", hollow=True)),
        ("after local distillation", lambda a, b: Dot(a + 4, b, 3.4, "kept")),
    ]
    marks += legend(keys, LEFT, 26)
    ends = ", ".join(f"{each['before']:.2g} to {each['after']:.2g}" for each in errors)
    return Drawing(WIDTH, HEIGHT, f"Distance behind each of {len(errors)} FFNs before and after: {ends}.", tuple(marks))


def blocks_section(report: Report, drawings: Mapping[str, Drawing]) -> str:
    """Return the section on local distillation, empty where there was none."""
    if "blocks" not in report:
        return ""
    errors = report["blocks"]
    before, after = (sum(each[when] for each in errors) / len(errors) for when in ("before", "after"))
    caption = (
        "Before recovery, each FFN in turn was trained to match the teacher’s residual stream. The figure shows the "
        "squared distance between the two streams after each FFN, relative to the squared norm of the teacher’s, "
        f"on held-out tokens. The mean over layers fell from {before:.2g} to {after:.2g}."
    )
    return section("Local distillation of FFNs", beside(drawings["blocks"], caption))
