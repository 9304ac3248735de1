"""What each FFN learnt before recovery, as a figure and as a section of the page."""

from collections.abc import Mapping, Sequence

from pipeline.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, legend, panel, scale
from pipeline.report.drawing import Dot, Drawing, Line
from pipeline.report.facts import Report
from pipeline.report.layout import beside, section


def errors_by_layer(errors: Sequence[Mapping[str, float]]) -> Drawing:
    """Draw two dots a layer, on a logarithmic axis: its distance from the teacher before and after its FFN learnt."""
    pairs = [[max(each[when], 1e-6) for when in ("before", "after")] for each in errors]
    x = Scale(-0.7, len(errors) - 0.3, LEFT, WIDTH - RIGHT)
    y = scale([value for pair in pairs for value in pair], HEIGHT - BOTTOM, TOP, log=True)
    marks = panel("Distance from the teacher’s stream", x, y, "layer of the student", x_ticks=6)
    radius = min(3.4, 110 / len(errors))
    for each, (before, after) in zip(errors, pairs):
        place, tip = x(each["layer"]), f"layer {each['layer']}: {each['before']:.3g} → {each['after']:.3g}"
        marks.append(Line(((place, y(before)), (place, y(after))), "muted", 1.4))
        marks.append(Dot(place, y(before), radius, "muted", tip, hollow=True))
        marks.append(Dot(place, y(after), radius, "kept", tip))
    keys = [
        ("as it was cut", lambda a, b: Dot(a + 4, b, 3.4, "muted", hollow=True)),
        ("once it has learnt", lambda a, b: Dot(a + 4, b, 3.4, "kept")),
    ]
    marks += legend(keys, LEFT, 26)
    told = ", ".join(f"{each['before']:.2g} to {each['after']:.2g}" for each in errors)
    return Drawing(WIDTH, HEIGHT, f"Distance behind each of {len(errors)} FFNs before and after: {told}.", tuple(marks))


def blocks_section(report: Report, drawings: Mapping[str, Drawing]) -> str:
    """Give the section on the FFNs that learnt, where they did."""
    if "blocks" not in report:
        return ""
    told = report["blocks"]
    before, after = (sum(each[when] for each in told) / len(told) for when in ("before", "after"))
    caption = (
        "Before recovery every FFN learnt, one after another, to bring the student’s stream back to the teacher’s. "
        "Shown is the squared distance between the two behind each FFN, over the square of the teacher’s, on tokens "
        f"it did not learn from. The mean over layers fell from {before:.2g} to {after:.2g}."
    )
    return section("FFN by FFN", beside(drawings["blocks"], caption))
