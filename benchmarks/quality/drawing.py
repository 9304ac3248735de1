"""The plots of the table: perplexity over the dense model's, by share removed, before and after recovery."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Figures
from rows import ROWS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1d1b18")  # Okabe and Ito
WAYS = {"recipes": "-", "ablations": "-", "baselines": "--", "peers": ":"}
MARKERS = "osD^vP"
MOST = 100  # times the dense perplexity; what is beyond is gone, and would press the rest together
STATES = {"before": "before recovery", "after": "after recovery"}


def draw(found: Sequence[Figures], path: Path) -> None:
    """Write a PNG with a panel for every text and state, and one line for every row; seeds are averaged."""
    texts = list(dict.fromkeys(text for each in found for text in each["texts"]))
    figure = Figure(figsize=(10.5, 3.1 * len(texts) + 1.4), layout="constrained")
    panels = figure.subplots(len(texts), len(STATES), sharex=True, squeeze=False)
    names = [name for name in ROWS if any(each["row"] == name for each in found)]
    for text, pair in zip(texts, panels):
        for (state, title), axes in zip(STATES.items(), pair):
            for number, name in enumerate(names):
                _line(axes, [each for each in found if each["row"] == name], text, state, number)
            axes.axhline(1.0, color="#6d685f", linewidth=0.8)
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.set_ylim(low, min(high, MOST))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if high < 10 else "")
            axes.set_title(f"{text}, {title}" + (f" (up to {MOST} times)" if high > MOST else ""), fontsize=10)
            axes.grid(alpha=0.3)
        pair[0].set_ylabel("perplexity / dense")
    for axes in panels[-1]:
        axes.set_xlabel("% of the parameters outside the embeddings removed")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _line(axes: Axes, found: Sequence[Figures], text: str, state: str, number: int) -> None:
    points: dict[float, list[float]] = {}
    for each in found:
        states = each["texts"].get(text, {})
        if state in states:
            ratio = states[state]["perplexity"] / states["dense"]["perplexity"]
            points.setdefault(each["removed"], []).append(ratio)
    row = ROWS[found[0]["row"]]
    where = sorted(points)
    axes.plot(
        where,
        [sum(points[removed]) / len(points[removed]) for removed in where],
        WAYS[row.group],
        marker=MARKERS[number // len(COLOURS) % len(MARKERS)],
        color=COLOURS[number % len(COLOURS)],
        markersize=4.5,
        linewidth=1.4,
        label=row.label,
    )
