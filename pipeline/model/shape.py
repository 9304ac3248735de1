"""What is known of a student before its blueprint: its widths, the layers that stay, the widths of each layer."""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.model.anatomy import LayerSizes
from pipeline.model.stored import Stored


@dataclass(frozen=True)
class Shape(Stored):
    """The widths of a student whose layers are alike.

    Where layers get widths of their own, `weights` is what Q, K, V, O, gate, up and down of all layers may hold
    together, and the widths are those of equal layers that hold as much.
    """

    FILE: ClassVar[str] = "shape.json"

    layers: int
    hidden: int
    heads: int
    groups: int
    neurons: int
    weights: int | None = None
    experts: int | None = None  # per layer that has any; None: all

    @property
    def widest(self) -> LayerSizes:
        """The widths of a layer."""
        return LayerSizes(self.heads, self.groups, self.neurons)

    def axes(self) -> dict[str, int]:
        """Return the five widths by axis."""
        return {name: getattr(self, name) for name in ("layers", "hidden", "heads", "groups", "neurons")}


@dataclass(frozen=True)
class Trial:
    """A set of layers, ascending, and the loss of the model that has only these, in nats per token."""

    kept: tuple[int, ...]
    loss: float


@dataclass(frozen=True)
class Depth(Stored):
    """The layers that stay, ascending, their loss (None: not measured), and every set that was measured, in order."""

    FILE: ClassVar[str] = "depth.json"

    kept: tuple[int, ...]
    loss: float | None
    tried: tuple[Trial, ...]


@dataclass(frozen=True)
class Widths(Stored):
    """The widths of every layer of the subject, once narrowed."""

    FILE: ClassVar[str] = "widths.json"

    layers: tuple[LayerSizes, ...]


@dataclass(frozen=True)
class StreamEnergy(Stored):
    """The mean square of each channel of a rotated stream at the norms, in sum h, and whether the matrices stay
    tied."""

    FILE: ClassVar[str] = "basis.json"

    energy: tuple[float, ...]
    tied: bool
