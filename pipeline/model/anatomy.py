"""A model as named axes: which tensors it has, and what each dimension of each of them runs over."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pipeline.model.families import Family, family_for
from pipeline.model.families.table import Sublayer
from pipeline.model.layer_types import layer_types
from pipeline.model.mixture import Routing, routing_of
from pipeline.model.sizes import Axis, Segment, Sizes, joint, parse, sizes_of

EXPERT = "{expert}"

IGNORED = (r"rotary_emb\.inv_freq$", r"rotary_pos_emb\.inv_freq$")  # checkpoint names that every class ignores


@dataclass(frozen=True)
class Anatomy:
    """A family's table applied to one checkpoint: its sizes, the tensors it has, the type of each layer."""

    family: Family
    sizes: Sizes
    optional: frozenset[str]  # the table's layer tensors that this checkpoint has in any layer
    tied: bool
    layer_types: tuple[str, ...]  # layers of one type are interchangeable: their per-layer config entries agree
    lacking: Mapping[str, frozenset[str]] = field(default_factory=dict)  # type: optional prefixes its layers lack
    outer: frozenset[str] = frozenset()  # further tensors outside the layers that this checkpoint has
    whole_heads: bool = False  # the class takes hidden sizes only that are query heads x head size
    routing: Routing | None = None  # of a mixture of experts

    @cached_property
    def required_layers(self) -> dict[int, str]:
        """Return the layers that every student keeps, each with the reason."""
        last = self.family.keeps_last
        parts = " and ".join(prefix.rstrip(".") for prefix in self.family.reused)
        reason = f"later layers have no {parts} of their own and reuse what it computes"
        return dict.fromkeys(sorted(self.reused_from.values()), reason) | (
            {len(self.sizes.layers) - 1: last} if last else {}
        )

    @cached_property
    def reused_from(self) -> dict[int, int]:
        """Return the earlier layer, of the same type, whose keys or other results each layer without its own reuses."""
        last, found = dict[str, int](), dict[int, int]()
        for layer, label in enumerate(self.layer_types if self.family.reused else ()):
            kind = label.partition(",")[0]
            if not self._reuses(layer):
                last[kind] = layer
            elif kind in last:
                found[layer] = last[kind]
        return found

    def protected_layers(self, first: int) -> frozenset[int]:
        """Return the layers that every student keeps, and the `first` ones."""
        return frozenset(range(first)) | self.required_layers.keys()

    def _reuses(self, layer: int) -> bool:
        """Whether a layer has none of the tensors whose results it can take from an earlier one."""
        return set(self.family.reused) <= self.lacking.get(self.layer_types[layer], frozenset())

    @cached_property
    def layer_tensors(self) -> dict[str, tuple[Segment, ...]]:
        """Return the layer tensors of this checkpoint, by name with a `{layer}` place."""
        table = expanded(self.family, self.sizes)
        return {self.family.prefix + n: parse(axes) for n, axes in table.items() if n in self.optional}

    @cached_property
    def expert_of(self) -> dict[str, tuple[str, int]]:
        """Return the name with an `{expert}` place, and the expert, of each layer tensor that belongs to one expert."""
        return {
            self.family.prefix + pattern.replace(EXPERT, str(expert)): (self.family.prefix + pattern, expert)
            for pattern in self.family.layer
            if EXPERT in pattern
            for expert in range(self.sizes.carried["e"])
        }

    @cached_property
    def routed(self) -> frozenset[str]:
        """Return the layer tensors of experts; a weight of the axes `e h` is the router's."""
        fused = {name for name, (first, *_) in self.layer_tensors.items() if first[:1] == ("e",) != first}
        routers = {name for name in fused if name.endswith(".weight") and self.layer_tensors[name] == (("e", "h"),)}
        return frozenset(self.expert_of.keys() & self.layer_tensors.keys() | (fused - routers))

    @cached_property
    def expert_writers(self) -> tuple[str, ...]:
        """Return the routed tensors that write to the hidden channels: `h x` of one expert, or of all with an axis
        `e`."""
        axes = {name: self.layer_tensors[name][0] for name in sorted(self.routed)}
        return tuple(n for n, own in axes.items() if own == ("h", "x") or ("e" in own and {"h", "x"} <= set(own)))

    @cached_property
    def shared_writer(self) -> str | None:
        """Return the `{layer}` module name of the projection from the neurons of shared experts, the axis `y`, to the
        hidden channels; None where there are none."""
        names = [n for n, axes in self.layer_tensors.items() if axes == (("h", "y"),)] if self.routing else []
        return names[0].removesuffix(".weight") if names and self.sizes.carried["y"] else None

    @property
    def shared_module(self) -> str | None:
        """Return the class's name of the module `shared_writer`."""
        own = self.family.shared_module
        return self.family.prefix + own if own and self.shared_writer else self.shared_writer

    @property
    def router(self) -> str:
        """Return the name, with a `{layer}` place, of the router's weight, whose axes are `e h`.

        ValueError for a family without experts.
        """
        names = [n for n, axes in self.layer_tensors.items() if axes == (("e", "h"),) and n.endswith(".weight")]
        if len(names) != 1:
            raise ValueError(f"model_type {self.family.model_type!r} has no router")
        return names[0]

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return any(self.has(name, layer) for name in self.routed)

    def expert_module(self, layer: int) -> str:
        """Return the name of the class's module of all experts of a layer."""
        return f"{self.family.prefix}{self.family.expert_module}".format(layer=layer)

    @cached_property
    def outer_tensors(self) -> dict[str, tuple[Segment, ...]]:
        """Return the tensors outside the layers; a tied output matrix is no tensor of its own."""
        outer = {self.embedding: parse("v h")}
        if not self.family.gainless:
            outer[self.final_norm] = parse("h")
        outer |= {name: parse(axes) for name, axes in self.family.outer.items() if name in self.outer}
        return outer if self.tied else outer | {self.head: parse("v h")}

    @cached_property
    def matrices(self) -> frozenset[str]:
        """Return the matrices over the vocabulary: embeddings, those of single layers too, and the output matrix."""
        return frozenset(name for name, (axes, *_) in self.outer_tensors.items() if axes[0] == "v" and len(axes) > 1)

    @property
    def embedding(self) -> str:
        return f"{self.family.embedding}.weight"

    @property
    def head(self) -> str:
        return f"{self.family.head}.weight"

    @property
    def final_norm(self) -> str:
        return f"{self.family.final_norm}.weight"

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """Return the gains over hidden channels: `{layer}` names of pre- and post-norms, then the final norm."""
        names = (f"{name}.weight" for name in (*self.family.pre_norms, *self.family.post_norms))
        gains = tuple(self.family.prefix + name for name in names if name in self.optional)
        return (*gains, *((self.final_norm,) if self.final_norm in self.outer_tensors else ()))

    def has(self, name: str, layer: int) -> bool:
        """Whether a layer has a tensor of the table, by its name with a `{layer}` place."""
        own = name.removeprefix(self.family.prefix)
        if own not in self.optional or any(sublayer.owns(own) for sublayer in self.removed(layer)):
            return False
        return not own.startswith(tuple(self.lacking.get(self.layer_types[layer], ())))

    def removed(self, layer: int) -> tuple[Sublayer, ...]:
        """Return the sub-layers, attention or FFN, that a layer has lost."""
        return self.family.removed(self.sizes.layers[layer])

    def modules(self, names: Iterable[str], layer: int) -> list[str]:
        """Return which of the modules of a layer it still has, by their whole names."""
        gone = tuple(f"{part}." for sublayer in self.removed(layer) for part in (sublayer.module, *sublayer.norms))
        prefix = self.family.prefix.format(layer=layer)
        return [prefix + name for name in names if not f"{name}.".startswith(gone)]

    def layer_module(self, axes: str) -> str:
        """Return the `{layer}` module name of the one projection with these axes, such as `h (n d)` for W_O.

        ValueError if the family has none, or several.
        """
        names = [n for n, a in self.family.layer.items() if a == axes and n.endswith(".weight")]
        if len(names) != 1:
            raise ValueError(f"model_type {self.family.model_type!r} has no single projection of axes {axes!r}")
        return self.family.prefix + names[0].removesuffix(".weight")

    def writer(self, axis: Axis) -> str | None:
        """Return the `{layer}` module name of the projection from an axis (`n d`, `f`) to the hidden channels.

        None if the family has no single one: its heads, or its neurons, are carried whole.
        """
        written = f"({axis})" if " " in axis else axis
        axes = f"{written} h" if self.family.transposed else f"h {written}"
        names = [n for n, a in self.family.layer.items() if a == axes and n.endswith(".weight")]
        return self.family.prefix + names[0].removesuffix(".weight") if len(names) == 1 else None

    def shape(self, segments: tuple[Segment, ...], layer: int, sizes: Sizes | None = None) -> tuple[int, ...]:
        """Return the shape of a tensor of these segments in a layer."""
        sizes = sizes or self.sizes
        along = joint(segments)
        return tuple(
            sum(sizes.length(segment[along], layer) for segment in segments)
            if i == along
            else sizes.length(axis, layer)
            for i, axis in enumerate(segments[0])
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor of the checkpoint."""
        shapes = {name: self.shape(segments, 0) for name, segments in self.outer_tensors.items()}
        for layer in range(len(self.sizes.layers)):
            for name, segments in self.layer_tensors.items():
                if self.has(name, layer):
                    shapes[name.format(layer=layer)] = self.shape(segments, layer)
        return shapes

    def layer_parameters(self, layer: int) -> int:
        """Return the number of parameters of a layer."""
        return sum(
            math.prod(self.shape(axes, layer)) for name, axes in self.layer_tensors.items() if self.has(name, layer)
        )

    def parameters(self) -> tuple[int, int]:
        """Return the number of parameters: all, and without the embedding and output matrices."""
        counts = {name: math.prod(shape) for name, shape in self.shapes().items()}
        inner = sum(count for name, count in counts.items() if name not in self.matrices)
        return sum(counts.values()), inner

    def active_parameters(self) -> tuple[int, int]:
        """Return the number of parameters that a token uses: all, and without the embedding and output matrices.

        Of the experts of a layer a token uses those that it is sent to.
        """
        whole, inner = self.parameters()
        if self.routing is None:
            return whole, inner
        layers = range(len(self.sizes.layers))
        experts = sum(
            math.prod(self.shape(self.layer_tensors[name], layer))
            for layer in layers
            for name in self.routed
            if self.has(name, layer)
        )
        idle = self.idle(experts)
        return whole - idle, inner - idle

    def idle(self, parameters: int) -> int:
        """Return how many of the parameters of all experts of a layer, or of several, a token does not use."""
        count = self.sizes.carried["e"]
        return parameters // count * (count - self.routing.top) if self.routing else 0

    def narrowed(self, sizes: Sizes, layer_types: tuple[str, ...]) -> "Anatomy":
        """Return the anatomy of a student of these sizes."""
        return replace(self, sizes=sizes, layer_types=layer_types)


def expanded(family: Family, sizes: Sizes) -> dict[str, str]:
    """Return a family's layer tensors with their axes, those of experts by the number of each."""
    table: dict[str, str] = {}
    for name, axes in family.layer.items():
        each = range(sizes.carried["e"]) if EXPERT in name else [0]
        table |= {name.replace(EXPERT, str(expert)): axes for expert in each}
    return table


def anatomy_of(config: Mapping[str, Any], names: Iterable[str]) -> Anatomy:
    """Return the anatomy of a checkpoint from its `config.json` and its tensor names.

    ValueError for an unknown family, a tensor the table does not know, or a missing weight.
    """
    family = family_for(config)
    names = set(names)
    sizes = sizes_of(config, family)
    count = len(sizes.layers)
    table = expanded(family, sizes)
    present = [frozenset(n for n in table if family.prefix.format(layer=i) + n in names) for i in range(count)]
    removed = [family.removed(widths) for widths in sizes.layers]
    absent = [
        frozenset(
            prefix
            for prefix in family.optional
            if not any(n.startswith(prefix) for n in own) and not any(sublayer.owns(prefix) for sublayer in gone)
        )
        for own, gone in zip(present, removed, strict=True)
    ]
    types, lacking = layer_types(config, absent)
    anatomy = Anatomy(
        family=family,
        sizes=sizes,
        optional=frozenset().union(*present),
        tied=f"{family.head}.weight" not in names,
        layer_types=types,
        lacking=lacking,
        outer=frozenset(family.outer) & names,
        whole_heads=family.whole_heads or _rope_type(config) in family.whole_heads_ropes,
        routing=routing_of(config, family),
    )
    expected = set(anatomy.shapes())
    required = (n for n in table if not n.endswith(".bias"))
    wanted = {
        family.prefix.format(layer=i) + n
        for n in required
        for i, gone in enumerate(absent)
        if not n.startswith(tuple(gone)) and not any(sublayer.owns(n) for sublayer in removed[i])
    }
    missing = sorted((expected | wanted) - names)
    ignored = re.compile("|".join((*IGNORED, *family.left_out)))
    unknown = sorted(n for n in names - expected if not ignored.search(n))
    if missing or unknown:
        raise ValueError(
            f"checkpoint of model_type {family.model_type!r} does not match its table: "
            f"missing {missing[:3] or 'nothing'}, unknown {unknown[:3] or 'nothing'}"
        )
    return anatomy


def _rope_type(config: Mapping[str, Any]) -> str | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type") or rope.get("type")
