"""What is known of a student before its blueprint: its widths, the layers that stay, the widths of each layer."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from pipeline.model.sizes import LayerSizes
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
    expert_neurons: int | None = None  # of each expert; None: all
    shared_neurons: int | None = None  # of shared experts together; None: all

    @property
    def widest(self) -> LayerSizes:
        """The widths of a layer."""
        return LayerSizes(self.heads, self.groups, self.neurons)

    @property
    def mixture(self) -> dict[str, int | None]:
        """Return how many experts, and neurons of experts, stay; None: all."""
        return {name: getattr(self, name) for name in ("experts", "expert_neurons", "shared_neurons")}

    def axes(self) -> dict[str, int]:
        """Return the five widths by axis."""
        return {name: getattr(self, name) for name in ("layers", "hidden", "heads", "groups", "neurons")}


@dataclass(frozen=True)
class Reachable:
    """What a possible shape reaches of a budget, and the shape, by axis."""

    value: float
    shape: dict[str, int]


@dataclass(frozen=True)
class Budgeted(Stored):
    """A budget and what the chosen shape reaches of it; `within` and `beyond`: the shapes nearest to it on both sides.

    Values are fractions for parameters, total and active_parameters, bytes for bytes, and the teacher's time over the
    student's for speedup. `context`: the tokens of the KV cache that bytes counts.
    """

    FILE: ClassVar[str] = "budget.json"

    budget: str
    requested: float
    reached: float
    within: Reachable
    beyond: Reachable | None
    context: int = 0

    def sentence(self) -> str:
        """Return the budget, what is reached of it and the nearest reachable shapes, as one line."""
        near = ", ".join(
            f"{self.shown(each.value)} ({_words(each.shape)})" for each in (self.within, self.beyond) if each
        )
        requested, reached = self.shown(self.requested), self.shown(self.reached)
        return f"budget.{self.budget}: {requested} requested, {reached} reached; nearest: {near}"

    def shown(self, value: float) -> str:
        """Return a value of this budget as text."""
        if self.budget == "bytes":
            return f"{value / 1e9:.4g} GB"
        return f"{value:.3f} x" if self.budget == "speedup" else f"{value:.2%}"


def _words(shape: dict[str, int]) -> str:
    return " ".join(f"{axis}={value}" for axis, value in shape.items())


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


def check_depth(count: int, total: int, protected: Collection[int]) -> None:
    """Raise ValueError where a student of `count` of `total` layers cannot have those that must stay."""
    least = max(1, len(protected))
    if not least <= count <= total:
        which = ", ".join(map(str, sorted(protected)))
        must = (
            f"; layers that must stay (plan.keep_first, or later layers reuse their results): {which}" if which else ""
        )
        raise ValueError(f"shape.layers is {count}; it must lie between {least} and {total}{must}")


@dataclass(frozen=True)
class MeasuredRemoval:
    """Sub-layers, each a layer and an axis of SUBLAYERS, and the KL in nats per token of the model without them."""

    removed: tuple[tuple[int, str], ...]
    divergence: float


@dataclass(frozen=True)
class Removal:
    """A sub-layer that is removed, and the KL in nats per token of the model without it and those before it."""

    layer: int
    sublayer: str  # of SUBLAYERS
    divergence: float


@dataclass(frozen=True)
class Sublayers(Stored):
    """The sub-layers that are removed, in order, and `hosts`, the layers that whole-layer removal keeps."""

    FILE: ClassVar[str] = "sublayers.json"

    hosts: tuple[int, ...]
    removed: tuple[Removal, ...]

    def without(self, layer: int, widths: LayerSizes) -> LayerSizes | None:
        """Return the widths of a layer without its removed sub-layers; None where nothing of it is left."""
        lost = {each.sublayer for each in self.removed if each.layer == layer}
        if "attention_layers" in lost:
            widths = replace(widths, heads=0, groups=0)
        if "ffn_layers" in lost:
            widths = replace(widths, neurons=0)
        return widths if widths.groups or widths.neurons else None


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
