"""The widths of a model and the letters that name its axes."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.model.families import Family
from pipeline.model.mixture import experts_of

Axis = str  # letters that share a dimension: "v", "h", "f", "d", "n d", "k q+2 d"
Segment = tuple[Axis, ...]


@dataclass(frozen=True)
class LayerSizes:
    """Widths of one layer, in heads and neurons."""

    heads: int
    groups: int
    neurons: int

    @property
    def each(self) -> int:
        """The query heads of a KV group; 0 where the layer has no attention."""
        return self.heads // (self.groups + (self.groups == 0))  # also of arrays of widths, as budgets count them

    def within(self, own: "LayerSizes") -> "LayerSizes":
        """Return these widths, bounded by those of a layer: KV groups, query heads per group, neurons."""
        groups = min(self.groups, own.groups)
        each = min(self.each, own.each)
        return LayerSizes(groups * each, groups, min(self.neurons, own.neurons))


@dataclass(frozen=True)
class Sizes:
    """Widths of a model: vocabulary, hidden channels, head size, and one LayerSizes per layer."""

    vocabulary: int
    hidden: int
    head_size: int
    layers: tuple[LayerSizes, ...]
    carried: Mapping[str, int] = field(default_factory=dict)  # lengths of a family's own axes; `e`: experts

    @property
    def uniform(self) -> bool:
        return len(set(self.layers)) <= 1

    def length(self, axis: Axis, layer: int) -> int:
        """Return the length of an axis in a layer: the product of its letters'."""
        widths = self.layers[layer]
        lengths = {
            "v": self.vocabulary,
            "h": self.hidden,
            "d": self.head_size,
            "f": widths.neurons,
            "n": widths.heads,
            "k": widths.groups,
            "q+2": widths.each + 2,
            **self.carried,
        }
        return math.prod(int(letter) if letter.isdigit() else lengths[letter] for letter in axis.split())


def parse(pattern: str) -> tuple[Segment, ...]:
    """Return the segments of an axes pattern: `f h + f h` is two segments of the axes `f` and `h`."""
    return tuple(
        tuple(group or single for group, single in re.findall(r"\(([^)]+)\)|(\w)", part))
        for part in re.split(r"\s\+\s", pattern)
    )


def joint(segments: tuple[Segment, ...]) -> int:
    """Return the dimension along which segments are concatenated: the first in which they differ, or the rows."""
    return next((i for i, axes in enumerate(zip(*segments)) if len(set(axes)) > 1), 0)


def sizes_of(config: Mapping[str, Any], family: Family) -> Sizes:
    """Return the widths that a `config.json` states, each layer's own where it has a `pruned` section."""
    hidden, heads = family.width(config, "hidden"), family.width(config, "heads")
    groups = family.groups or family.width(config, "groups") or heads
    neurons = family.width(config, "neurons") or (family.neurons_per_channel or 0) * hidden
    per_layer = config.get("pruned", {}).get("layers")
    widths = LayerSizes(heads, groups, neurons)
    layers = (
        tuple(LayerSizes(**entry) for entry in per_layer) if per_layer else (widths,) * family.width(config, "layers")
    )
    carried = {axis: sum(_product(config, name) for name in fields) for axis, fields in family.lengths.items()}
    if family.experts:
        carried["e"] = experts_of(config, family)
    head_size = family.width(config, "head_size") or hidden // heads
    return Sizes(family.width(config, "vocabulary"), hidden, head_size, layers, carried)


def _product(config: Mapping[str, Any], fields: str) -> int:
    """Return the product of config fields and numbers joined by `*`; a field without a value counts as zero."""
    return math.prod(int(name) if name.isdigit() else config.get(name) or 0 for name in fields.split("*"))
