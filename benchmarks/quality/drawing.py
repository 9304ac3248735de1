"""The plots of the table: perplexity over the dense model's, before and after recovery, by share removed or by row."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Figures, over_dense
from rows import ROWS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1d1b18")  # Okabe and Ito
WAYS = {"recipes": "-", "ablations": "-", "baselines": "--", "peers": ":"}
MARKERS = "osD^vP"
MOST = 100  # times the dense perplexity; what is beyond is gone, and would press the rest together
GONE = 1e30  # times: where a line leaves the panel for that is beyond all numbers
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


def draw_bars(found: Sequence[Figures], path: Path) -> None:
    """Write a PNG with a panel for every text, and in it for every row a bar before recovery and a dot after it.

    Shown is the share removed that most rows have; seeds are averaged.
    """
    shares = [each["removed"] for each in found]
    removed = max(sorted(set(shares)), key=shares.count)
    found = [each for each in found if each["removed"] == removed]
    texts = list(dict.fromkeys(text for each in found for text in each["texts"]))
    names = [name for name in ROWS if any(each["row"] == name for each in found)]
    figure = Figure(figsize=(10.5, 0.24 * len(names) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for text, axes in zip(texts, panels):
        for place, name in enumerate(names):
            rows = [each for each in found if each["row"] == name]
            before, after = (ratios(rows, text, state).get(removed) for state in STATES)
            if before:
                axes.barh(place, min(before, MOST) - 1.0, left=1.0, height=0.62, color=COLOURS[0], alpha=0.55)
                label = format(before, ".2f" if before < 1e5 else ".0e")
                axes.text(min(before, MOST), place, f" {label}", va="center", fontsize=7)
            if after:
                axes.plot(min(after, MOST), place, "o", color=COLOURS[1], markersize=4.5)
        axes.axvline(1.0, color="#6d685f", linewidth=0.8)
        axes.set_xscale("log")
        least = axes.dataLim.x0  # below 1 where one that learns the text too ends nearer to it than the dense model is
        most = axes.get_xlim()[1] ** 1.15  # room for the number beside the longest bar
        axes.set_xlim(1.0 if least >= 1.0 else 0.9 * least, most)
        axes.margins(y=0.01)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}" if axes.get_xlim()[1] < 10 else "")
        axes.tick_params(labelsize=7, which="both")
        axes.set_title(text, fontsize=10)
    panels[0].set_yticks(range(len(names)), [ROWS[name].label for name in names], fontsize=7.5)
    panels[0].invert_yaxis()
    caption = f"perplexity / dense, {removed:g} % removed; bars: before recovery, dots: after"
    figure.supxlabel(caption, fontsize=9)
    figure.savefig(path, dpi=130)


def ratios(found: Sequence[Figures], text: str, state: str) -> dict[float, float]:
    """Return one row's perplexity over the dense model's, the mean over seeds, by share removed, ascending."""
    points: dict[float, list[float]] = {}
    for each in found:
        states = each["texts"].get(text, {})
        if state in states:
            points.setdefault(each["removed"], []).append(over_dense(states, state))
    return {removed: sum(values) / len(values) for removed, values in sorted(points.items())}


def _line(axes: Axes, found: Sequence[Figures], text: str, state: str, number: int) -> None:
    points = ratios(found, text, state)
    row = ROWS[found[0]["row"]]
    axes.plot(
        points.keys(),
        [min(ratio, GONE) for ratio in points.values()],
        WAYS[row.group],
        marker=MARKERS[number // len(COLOURS) % len(MARKERS)],
        color=COLOURS[number % len(COLOURS)],
        markersize=4.5,
        linewidth=1.4,
        label=row.label,
    )
