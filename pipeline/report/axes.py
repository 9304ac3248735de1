"""Scales, ticks and labels shared by the figures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.report.drawing import Line, Mark, Text

WIDTH, HEIGHT = 348.0, 224.0  # a panel: one column of the page, the whole width of a phone
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 34.0, 34.0


@dataclass(frozen=True)
class Scale:
    """A map from values in [low, high] to pixels in [start, end], linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self._least)))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    @property
    def _least(self) -> float:
        return self.low if self.log else -math.inf

    def ticks(self, wanted: int) -> list[float]:
        """Return about `wanted` round values inside the scale."""
        return _log_ticks(self.low, self.high, wanted) if self.log else _linear_ticks(self.low, self.high, wanted)


def scale(values: Sequence[float], start: float, end: float, log: bool = False, zero: bool = False) -> Scale:
    """Return a scale that contains all values with a margin; with `zero` a linear one starts at 0."""
    low, high = min(values), max(values)
    if log:
        room = max((math.log(high) - math.log(low)) * 0.06, 0.02)
        return Scale(low * math.exp(-room), high * math.exp(room), start, end, True)
    low = min(low, 0.0) if zero else low
    room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return Scale(low if zero and low == 0 else low - room, high + room, start, end)


def _linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    rough = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tenths = tuple(i / 10 for i in range(10, 100))
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(range(1, 10)), tenths):
        found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(found) >= min(wanted, 3):
            break
    return found[:: max(1, -(-len(found) // (wanted + 2)))]


def number(value: float) -> str:
    """Return a number as short text: 1 234 567 as 1.23M, 0.00031 as 3.1e-4."""
    if value == 0:
        return "0"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size * 0.99995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def panel(title: str, x: Scale, y: Scale, x_label: str, x_ticks: int = 5, y_ticks: int = 4) -> list[Mark]:
    """Return the frame of a panel: its title, horizontal grid lines with their values, ticks along the bottom."""
    floor = y.start
    marks: list[Mark] = [Text(0, 14, title, "ink", 12.5, bold=True)]
    for value in y.ticks(y_ticks):
        marks += [
            Line(((x.start, y(value)), (x.end, y(value))), "grid"),
            Text(x.start - 6, y(value) + 3.8, number(value), anchor="end", size=10.5),
        ]
    for value in x.ticks(x_ticks):
        marks.append(Text(x(value), floor + 15, number(value), anchor="middle", size=10.5))
    marks.append(Line(((x.start, floor), (x.end, floor)), "muted", 0.8))
    marks.append(Text(x.end, floor + 29, x_label, anchor="end", size=10.5))
    return marks


def legend(entries: Sequence[tuple[str, Callable[[float, float], Mark]]], x: float, y: float) -> list[Mark]:
    """Return a row of legend keys, each a mark made at (x, y) and its label to the right."""
    marks: list[Mark] = []
    for label, key in entries:
        marks += [key(x, y), Text(x + 13, y + 4, label, size=10.5)]
        x += 13 + 5.4 * len(label) + 18
    return marks
