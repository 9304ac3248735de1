"""What a shape search found, as an artifact holds it."""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.costmodel.pareto import Candidate, Search, Serving
from pipeline.model.shape import Shape
from pipeline.model.stored import Stored


@dataclass(frozen=True)
class Row:
    """A shape with the chip model's predictions and its measured loss (the teacher's is not measured)."""

    shape: Shape
    kept: float
    decode_rate: float
    prefill_seconds: float
    memory_bytes: float
    loss: float | None
    front: bool

    @staticmethod
    def of(candidate: Candidate) -> "Row":
        """Return the row of a candidate."""
        return Row(**vars(candidate) | {"shape": Shape(**candidate.shape.axes())})


@dataclass(frozen=True)
class SearchResult(Stored):
    """The teacher beside all measured candidates, fastest first, and the shape that was picked."""

    FILE: ClassVar[str] = "search.json"

    chip: str
    serving: Serving
    rule: str
    aligned: int  # shapes whose speed was predicted
    within: int  # of these within the limits
    teacher: Row
    candidates: tuple[Row, ...]
    picked: Shape

    @staticmethod
    def of(search: Search) -> "SearchResult":
        """Return the result of a finished search."""
        return SearchResult(
            search.chip,
            search.serving,
            f"the fastest shape whose loss is within {search.tolerance} nats of the lowest",
            search.costed.aligned,
            len(search.costed.seconds),
            Row.of(search.teacher),
            tuple(map(Row.of, search.candidates)),
            Shape(**search.picked.shape.axes()),
        )
