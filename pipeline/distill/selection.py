"""Which state of a training becomes its result, and when it stops early: decided by held-out measurements alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pipeline.model.stored import Stored


@dataclass(frozen=True)
class RecoveryFacts(Stored):
    """What a training did to its held-out measurements, and which state is exported."""

    FILE: ClassVar[str] = "recovery.json"

    metric: str
    first: float  # before the first step
    last: float
    last_step: int
    exported: float
    exported_step: int
    stopped_early: bool
    helped: bool  # the exported state has a lower value than the first
    rose: bool  # the last state has a higher value than the first


@dataclass(frozen=True)
class Selection:
    """The held-out measurements of a training so far, and what follows from them.

    `metric`: the number that is compared, lower is better. `best`: whether the state of the lowest value is exported
    (else the last one). `patience`: measurements without a new lowest value after which training stops (None: never).
    """

    metric: str
    best: bool
    patience: int | None
    first: float = math.nan  # the value before the first step
    last: float = math.nan
    lowest: float = math.inf
    lowest_step: int | None = None
    last_step: int = 0
    waited: int = 0  # measurements since the lowest value

    def after(self, step: int, metrics: Mapping[str, Any]) -> "Selection":
        """Return the selection after the measurements of a step; unchanged where the metric is not among them."""
        if self.metric not in metrics:
            return self
        value = metrics[self.metric]
        values = {"last": value, "last_step": step} | ({"first": value} if step == 0 else {})
        if value < self.lowest:
            return replace(self, **values, lowest=value, lowest_step=step, waited=0)
        return replace(self, **values, waited=self.waited + 1)

    @property
    def stops(self) -> bool:
        """Whether training ends here, before its last step."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def exported(self) -> int | None:
        """The step whose state is exported; None for that of the last step."""
        return self.lowest_step if self.best else None

    def facts(self, offset: int) -> RecoveryFacts:
        """Return what is reported, steps counted from `offset`."""
        best = self.exported is not None
        step, value = (self.lowest_step or 0, self.lowest) if best else (self.last_step, self.last)
        return RecoveryFacts(
            metric=self.metric,
            first=self.first,
            last=self.last,
            last_step=offset + self.last_step,
            exported=value,
            exported_step=offset + step,
            stopped_early=self.stops,
            helped=value < self.first,
            rose=self.last > self.first,
        )

    def messages(self, section: str, offset: int) -> list[str]:
        """Return lines for the user: training stopped early, did not help, or exports an earlier state."""
        if not self.metric:
            return []
        facts, lines = self.facts(offset), []
        name = self.metric.replace("_", " ").replace("kl", "KL").replace("held out", "held-out")
        if facts.stopped_early:
            lines.append(
                f"{section}: stopped after step {facts.last_step}: {self.patience} measurements without a lower "
                f"{name} ({section}.patience)"
            )
        exported = f"the state of step {facts.exported_step}, {name} {facts.exported:.4f}"
        if facts.rose or not facts.helped:
            lines.append(
                f"{section}: WARNING: training did not lower the {name}: {facts.first:.4f} before it, "
                f"{facts.last:.4f} after it; exported is {exported}; lower {section}.learning_rate or use more text"
            )
        elif facts.exported_step != facts.last_step:
            lines.append(f"{section}: exported is {exported}; the last state has {facts.last:.4f}")
        return lines
