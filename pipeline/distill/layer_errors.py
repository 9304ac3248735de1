"""The errors that local distillation measured, as an artifact holds them."""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.model.stored import Stored


@dataclass(frozen=True)
class LayerError:
    """The error behind a layer's FFN on held-out tokens, before and after its training.

    The squared distance between the student's residual stream and the teacher's, over the square of the teacher's.
    """

    layer: int
    before: float
    after: float


@dataclass(frozen=True)
class LayerErrors(Stored):
    """The errors of all layers of the student, the first layer first."""

    FILE: ClassVar[str] = "local_distill.json"

    layers: tuple[LayerError, ...]

    def means(self) -> tuple[float, float]:
        """Return the means over layers, before and after."""
        before, after = (sum(values) / len(self.layers) for values in zip(*((e.before, e.after) for e in self.layers)))
        return before, after
