"""Draw a finished shape search: speed against measured loss, the front, and the shape picked."""

from pathlib import Path

from matplotlib.figure import Figure

from pipeline.search.pareto import Candidate, Search


def draw(search: Search, path: Path) -> None:
    """Write a PNG: every measured candidate, the front as a line, the picked one ringed and named."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
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
    axes.set_title(f"picked: {_name(best)}\n({rule})", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _speedup(search: Search, candidate: Candidate) -> float:
    return search.teacher.seconds(search.serving) / candidate.seconds(search.serving)


def _name(candidate: Candidate) -> str:
    shape = candidate.shape
    return f"{shape.layers} layers, {shape.hidden} hidden, {shape.heads}/{shape.groups} heads, {shape.neurons} neurons"
