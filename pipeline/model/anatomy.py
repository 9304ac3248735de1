"""A model seen as named axes: which tensors it has, and what each dimension of each of them runs over."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipeline.model.families import EMBEDDING, FINAL_NORM, HEAD, LAYER, Family, family_of

Axis = str  # "v", "h", "f", "d", "n d" or "k d"
Segment = tuple[Axis, ...]


@dataclass(frozen=True)
class LayerSizes:
    """Widths of one layer, in heads and neurons."""

    heads: int
    groups: int
    neurons: int

    def within(self, own: "LayerSizes") -> "LayerSizes":
        """Give these widths where a layer has as much, else its own: KV groups, query heads of each, neurons."""
        groups = min(self.groups, own.groups)
        each = min(self.heads // self.groups, own.heads // own.groups)
        return LayerSizes(groups * each, groups, min(self.neurons, own.neurons))


@dataclass(frozen=True)
class Sizes:
    """Widths of a model: vocabulary, hidden channels, head size, and one LayerSizes per layer."""

    vocabulary: int
    hidden: int
    head_size: int
    layers: tuple[LayerSizes, ...]

    @property
    def uniform(self) -> bool:
        return len(set(self.layers)) <= 1

    def length(self, axis: Axis, layer: int) -> int:
        """Give the length of an axis in a layer."""
        widths = self.layers[layer]
        return {
            "v": self.vocabulary,
            "h": self.hidden,
            "d": self.head_size,
            "f": widths.neurons,
            "n d": widths.heads * self.head_size,
            "k d": widths.groups * self.head_size,
        }[axis]


def parse(pattern: str) -> tuple[Segment, ...]:
    """Give the segments of an axes pattern: `f h + f h` is two segments of the axes `f` and `h`."""
    return tuple(
        tuple(group or single for group, single in re.findall(r"\(([a-z ]+)\)|([a-z])", part))
        for part in pattern.split("+")
    )


@dataclass(frozen=True)
class Anatomy:
    """A family's table applied to one checkpoint: its sizes, the tensors it really has, the type of each layer."""

    family: Family
    sizes: Sizes
    optional: frozenset[str]  # the table's layer tensors that this checkpoint has
    tied: bool
    layer_types: tuple[str, ...]

    @cached_property
    def layer_tensors(self) -> dict[str, tuple[Segment, ...]]:
        """Give the layer tensors of this checkpoint, by name with a `{layer}` place."""
        return {LAYER + n: parse(axes) for n, axes in self.family.layer.items() if n in self.optional}

    @cached_property
    def outer_tensors(self) -> dict[str, tuple[Segment, ...]]:
        """Give the tensors outside the layers; a tied output matrix is no tensor of its own."""
        outer = {EMBEDDING: parse("v h"), FINAL_NORM: parse("h")}
        return outer if self.tied else outer | {HEAD: parse("v h")}

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """Give the gains over hidden channels: `{layer}` names of pre- and post-norms, then the final norm."""
        names = (*self.family.pre_norms, *self.family.post_norms)
        return (*(f"{LAYER}{name}.weight" for name in names), FINAL_NORM)

    def layer_module(self, axes: str) -> str:
        """Give the `{layer}` module name of the one projection with these axes, such as `h (n d)` for W_O."""
        (name,) = (n for n, a in self.family.layer.items() if a == axes and n.endswith(".weight"))
        return LAYER + name.removesuffix(".weight")

    def shape(self, segments: tuple[Segment, ...], layer: int, sizes: Sizes | None = None) -> tuple[int, ...]:
        """Give the shape of a tensor of these segments in a layer."""
        sizes = sizes or self.sizes
        rows = sum(sizes.length(segment[0], layer) for segment in segments)
        return (rows, *(sizes.length(axis, layer) for axis in segments[0][1:]))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the name and shape of every tensor of the checkpoint."""
        shapes = {name: self.shape(segments, 0) for name, segments in self.outer_tensors.items()}
        for layer in range(len(self.sizes.layers)):
            for name, segments in self.layer_tensors.items():
                shapes[name.format(layer=layer)] = self.shape(segments, layer)
        return shapes

    def parameters(self) -> tuple[int, int]:
        """Give the number of parameters, all and without the embedding and output matrices."""
        counts = {name: _product(shape) for name, shape in self.shapes().items()}
        return sum(counts.values()), sum(n for name, n in counts.items() if name not in (EMBEDDING, HEAD))

    def narrowed(self, sizes: Sizes, layer_types: tuple[str, ...]) -> "Anatomy":
        """Give the anatomy of a student of these sizes."""
        return replace(self, sizes=sizes, layer_types=layer_types)


def _product(shape: Iterable[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def anatomy_of(config: Mapping[str, Any], names: Iterable[str]) -> Anatomy:
    """Give the anatomy of a checkpoint from its `config.json` and its tensor names.

    ValueError for an unknown family, a tensor the table does not know, or a missing weight.
    """
    family = family_of(config["model_type"])
    names = set(names)
    count = config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    widths = LayerSizes(heads, config.get("num_key_value_heads") or heads, config["intermediate_size"])
    per_layer = config.get("pruned", {}).get("layers")
    layers = tuple(LayerSizes(**entry) for entry in per_layer) if per_layer else (widths,) * count
    sizes = Sizes(
        config["vocab_size"], config["hidden_size"], config.get("head_dim") or config["hidden_size"] // heads, layers
    )
    prefix = LAYER.format(layer=0)
    optional = frozenset(n.removeprefix(prefix) for n in names if n.startswith(prefix)) & set(family.layer)
    anatomy = Anatomy(family, sizes, optional, HEAD not in names, _layer_types(config, count))
    expected = set(anatomy.shapes())
    wanted = {prefix + n for n in family.layer if n.endswith(".weight")}
    missing = sorted((expected | wanted) - names)
    strange = sorted(n for n in names - expected if not n.endswith("rotary_emb.inv_freq"))
    if missing or strange:
        raise ValueError(
            f"checkpoint of model_type {family.model_type!r} does not match its table: "
            f"missing {missing[:3] or 'nothing'}, unknown {strange[:3] or 'nothing'}"
        )
    return anatomy


def _layer_types(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    types = config.get("layer_types")
    return tuple(types) if types else ("full_attention",) * count
