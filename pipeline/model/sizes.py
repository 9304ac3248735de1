"""The widths of a model and the letters that name its axes."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    neuron_factor: int = 1  # its neurons are this many times those that the config states

    @property
    def each(self) -> int:
        """The query heads of a KV group; 0 where the layer has no attention."""
        return self.heads // (self.groups + (self.groups == 0))  # also of arrays of widths, as budgets count them

    def within(self, own: "LayerSizes") -> "LayerSizes":
        """Return these widths, bounded by those of a layer: KV groups, query heads per group, neurons."""
        groups = min(self.groups, own.groups)
        each = min(self.each, own.each)
        neurons = min(self.neurons * own.neuron_factor // self.neuron_factor, own.neurons)
        return LayerSizes(groups * each, groups, neurons, own.neuron_factor)

    @property
    def entry(self) -> dict[str, int]:
        """Return the widths as a `pruned` section of a config has them."""
        return {"heads": self.heads, "groups": self.groups, "neurons": self.neurons}

    @property
    def for_config(self) -> "LayerSizes":
        """Return the widths as a config states them."""
        return replace(self, neurons=-(-self.neurons // self.neuron_factor), neuron_factor=1)


@dataclass(frozen=True)
class Sizes:
    """Widths of a model: vocabulary, hidden channels, head size, and one LayerSizes per layer."""

    vocabulary: int
    hidden: int
    head_size: int
    layers: tuple[LayerSizes, ...]
    carried: Mapping[str, int] = field(default_factory=dict)  # lengths of a family's own axes; `e`: experts
    by_layer: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of those whose lengths differ

    @property
    def uniform(self) -> bool:
        """Whether all layers are as wide as the class makes them by one set of config fields."""
        stated = {widths.for_config for widths in self.layers}
        return len(stated) <= 1 and not any(widths.neurons % widths.neuron_factor for widths in self.layers)

    def of_layers(self, hosts: Sequence[int], widths: Iterable[LayerSizes]) -> "Sizes":
        """Return the sizes of a model of some of these layers, with these widths."""
        alike, by_layer = own_lengths({axis: tuple(own[h] for h in hosts) for axis, own in self.by_layer.items()})
        return replace(self, layers=tuple(widths), carried=dict(self.carried) | alike, by_layer=by_layer)

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
            "L": len(self.layers),
            **self.carried,
            **{own: lengths[layer] for own, lengths in self.by_layer.items()},
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
    count = len(per_layer) if per_layer else family.width(config, "layers")
    double = reusing_layers(config, family, count) if config.get(str(family.double_wide)) else range(0)
    factors = [2 if layer in double else 1 for layer in range(count)]
    given = per_layer or [{"heads": heads, "groups": groups, "neurons": neurons * factor} for factor in factors]
    layers = tuple(LayerSizes(**entry, neuron_factor=factor) for entry, factor in zip(given, factors, strict=True))
    carried, by_layer = own_lengths(_lengths(config, family, count))
    if family.experts:
        carried["e"] = experts_of(config, family)
    head_size = family.width(config, "head_size") or hidden // heads
    return Sizes(family.width(config, "vocabulary"), hidden, head_size, layers, carried, by_layer)


def _lengths(config: Mapping[str, Any], family: Family, count: int) -> dict[str, tuple[int, ...]]:
    """Return the lengths of a family's own axes in each layer."""
    own = fields_by_layer(config, family)
    kinds = config.get("layer_types") or [""] * count
    layers = [
        ({**config, **own.get(layer, {})}, {**family.lengths, **family.lengths_by_type.get(kind, {})})
        for layer, kind in enumerate(kinds[:count])
    ]
    return {
        axis: tuple(sum(_product(fields, name) for name in terms[axis]) for fields, terms in layers)
        for axis in family.lengths
    }


def fields_by_layer(config: Mapping[str, Any], family: Family) -> dict[int, Mapping[str, Any]]:
    """Return the config fields that single layers have of their own, by layer; transformers pads numbers with zeros."""
    own = config.get(family.layer_fields) if family.layer_fields else None
    return {int(layer): fields for layer, fields in (own or {}).items()}


def own_lengths(lengths: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Return the lengths of a family's own axes by layer as those that all layers share, and the others."""
    carried = {axis: of_layers[0] for axis, of_layers in lengths.items() if len(set(of_layers)) == 1}
    return carried, {axis: of_layers for axis, of_layers in lengths.items() if axis not in carried}


def reusing_layers(config: Mapping[str, Any], family: Family, count: int) -> range:
    """Return which of `count` layers, the last ones, reuse what earlier ones compute."""
    return range(count - (config.get(family.reusing) or 0), count) if family.reusing else range(0)


def _product(config: Mapping[str, Any], fields: str) -> int:
    """Return the product of config fields and numbers joined by `*`; a field without a value counts as zero."""
    return math.prod(int(name) if name.isdigit() else config.get(name) or 0 for name in fields.split("*"))
