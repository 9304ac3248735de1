"""Draw a finished shape search: what was costed, speed against measured loss, the front, and the shape picked."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.costmodel.pareto import Candidate, Search

MARGIN = 0.96  # of the costed shapes those near the measured ones are shown


def draw(search: Search, path: Path) -> None:
    """Write a PNG: above, size and speed of every shape costed; below, the measured ones, the front as a line, the
    picked one ringed and named."""
    figure = Figure(figsize=(7.5, 6.6), layout="constrained")
    above, axes = figure.subplots(2, sharex=True, height_ratios=(2, 3))
    _costed(search, above)
    speed = {candidate: _speedup(search, candidate) for candidate in search.candidates}
    front = [candidate for candidate in search.candidates if candidate.front]
    behind = [candidate for candidate in search.candidates if not candidate.front]
    if behind:
        axes.scatter([speed[each] for each in behind], [each.loss for each in behind], color="#9aa0a6", label="behind")
    axes.plot([speed[each] for each in front], [each.loss for each in front], "o-", color="#1f6feb", label="front")
    best = search.picked
    axes.scatter([_speedup(search, best)], [best.loss], s=180, facecolors="none", edgecolors="#d1242f", linewidths=2)
    axes.set_xlabel(f"{search.serving.speed} speed over the teacher's, predicted for {search.chip}")
    axes.set_ylabel("loss right after pruning, nats a token")
    rule = f"the fastest within {search.tolerance:g} nats of the lowest loss"
    figure.suptitle(f"picked: {_name(best)}\n({rule})", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _costed(search: Search, axes: Axes) -> None:
    whole = search.teacher.seconds(search.serving)
    speed = [whole / seconds for seconds in search.costed.seconds]
    label = f"{len(speed)} within the limits, of {search.costed.aligned} aligned shapes"
    axes.scatter(speed, [100 * kept for kept in search.costed.kept], s=4, color="#c8ccd1", label=label, rasterized=True)
    measured = [(_speedup(search, each), 100 * each.kept) for each in search.candidates]
    axes.set_xlim(MARGIN * min(x for x, _ in measured), max(x for x, _ in measured) / MARGIN)
    axes.set_ylim(MARGIN**2 * min(y for _, y in measured), max(y for _, y in measured) / MARGIN)
    speeds, losses = zip(*measured)
    axes.scatter(speeds, losses, s=28, color="#1f6feb", label=f"{len(measured)} cut and measured")
    axes.set_ylabel("% of the weights kept")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _speedup(search: Search, candidate: Candidate) -> float:
    return search.teacher.seconds(search.serving) / candidate.seconds(search.serving)


def _name(candidate: Candidate) -> str:
    shape = candidate.shape
    return f"{shape.layers} layers, {shape.hidden} hidden, {shape.heads}/{shape.groups} heads, {shape.neurons} neurons"
