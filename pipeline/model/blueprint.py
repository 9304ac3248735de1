"""A student described by what it takes from its source: the plan as a value, JSON on disk."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from pipeline.model.anatomy import Anatomy
from pipeline.model.merged_experts import composed_merges
from pipeline.model.mixture import narrowing_of
from pipeline.model.sizes import LayerSizes, Sizes
from pipeline.model.stored import Stored


@dataclass(frozen=True)
class Group:
    """One KV bundle: keys and values of (layer, kv), with the query heads (layer, head) that read them."""

    layer: int
    kv: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """One student layer: the source layer that hosts it (norms and FFN), its KV bundles, its neurons, its experts."""

    host: int
    groups: tuple[Group, ...]  # empty: the layer has no attention
    neurons: tuple[int, ...]  # empty: the layer has no FFN
    experts: tuple[int, ...] = ()  # empty: all experts of the host, if it has any
    expert_neurons: tuple[tuple[int, ...], ...] = ()  # of each expert that stays; empty: all neurons
    # Of each expert that stays: the experts whose weighted mean it becomes, each with its share; empty: as they are
    merged: tuple[tuple[tuple[int, float], ...], ...] = ()
    # The neurons of each of these experts in the order in which they are averaged; empty: in its own
    aligned: tuple[tuple[tuple[int, ...], ...], ...] = ()
    shared: tuple[int, ...] = ()  # neurons of shared experts; empty: all


@dataclass(frozen=True)
class Blueprint(Stored):
    """The whole student: kept hidden channels, the layers and the kept tokens, all in indices of the source model."""

    FILE: ClassVar[str] = "blueprint.json"
    INDENT: ClassVar[int | None] = None

    channels: tuple[int, ...]
    layers: tuple[LayerPlan, ...]
    vocabulary: tuple[int, ...] = ()  # empty: all tokens; else the student's token i is the source's vocabulary[i]

    def sizes(self, source: Sizes) -> Sizes:
        """Return the widths of the student."""
        hosts = [plan.host for plan in self.layers]
        widths = (
            LayerSizes(
                sum(len(g.heads) for g in p.groups), len(p.groups), len(p.neurons), source.layers[p.host].neuron_factor
            )
            for p in self.layers
        )
        kept = max((len(plan.experts) for plan in self.layers), default=0)
        carried = dict(source.carried) | ({"e": kept} if kept else {})
        inner = next((len(plan.expert_neurons[0]) for plan in self.layers if plan.expert_neurons), 0)
        shared = max((len(plan.shared) for plan in self.layers), default=0)
        carried |= ({"x": inner} if inner else {}) | ({"y": shared} if shared else {})
        vocabulary = len(self.vocabulary) or source.vocabulary
        whole = replace(source, vocabulary=vocabulary, hidden=len(self.channels), carried=carried)
        return whole.of_layers(hosts, widths)

    def student(self, anatomy: Anatomy) -> Anatomy:
        """Return the anatomy of the student; ValueError if the plan does not fit the source."""
        self.check(anatomy)
        types = tuple(anatomy.layer_types[plan.host] for plan in self.layers)
        return anatomy.narrowed(self.sizes(anatomy.sizes), types)

    def check(self, anatomy: Anatomy) -> None:
        """Raise ValueError where an index is out of range or repeated, an axis is cut that the family keeps whole, a
        donor has another layer type, or the groups of a layer differ in their number of heads (repeat-KV attention
        needs them equal)."""
        _distinct("channels", self.channels, anatomy.sizes.hidden)
        if self.vocabulary:
            _distinct("blueprint vocabulary", self.vocabulary, anatomy.sizes.vocabulary)
        for place, plan in enumerate(self.layers):
            at = f"blueprint layer {place}"
            _distinct(f"{at} host", (plan.host,), len(anatomy.sizes.layers))
            if plan.neurons:
                _distinct(f"{at} neurons", plan.neurons, anatomy.sizes.layers[plan.host].neurons)
            if len({len(group.heads) for group in plan.groups}) > 1:
                raise ValueError(f"{at}: its KV groups must have equal numbers of heads")
            if not plan.groups and not plan.neurons:
                raise ValueError(f"{at}: it has neither attention nor FFN; leave the layer out")
            if len({(g.layer, g.kv) for g in plan.groups}) != len(plan.groups):
                raise ValueError(f"{at}: a KV group is taken twice")
            for group in plan.groups:
                _distinct(f"{at} donor", (group.layer,), len(anatomy.sizes.layers))
                widths = anatomy.sizes.layers[group.layer]
                each = widths.each
                _distinct(f"{at} kv", (group.kv,), widths.groups)
                _distinct(f"{at} heads", group.heads, widths.heads)
                if any(head // each != group.kv for head in group.heads):
                    raise ValueError(f"{at}: heads {group.heads} do not all read KV group {group.kv}")
                if anatomy.layer_types[group.layer] != anatomy.layer_types[plan.host]:
                    raise ValueError(
                        f"{at}: donor layer {group.layer} is {anatomy.layer_types[group.layer]} and host layer "
                        f"{plan.host} is {anatomy.layer_types[plan.host]}; a donor must have its host's type"
                    )
        _check_experts(self, anatomy)
        _check_attention(self, anatomy)
        _check_sublayers(self, anatomy)
        for axis in _cut_axes(self, anatomy.sizes):
            check_axis(anatomy, axis)


@dataclass(frozen=True)
class Step(Blueprint):
    """What one round takes from the student of the round before, where a run has several rounds."""

    FILE: ClassVar[str] = "step.json"


def to_cut(folder: Path) -> Blueprint:
    """Load what is cut from the subject: the step of this round where there are several, else the blueprint."""
    return Step.load(folder) if (folder / Step.FILE).exists() else Blueprint.load(folder)


def _check_experts(blueprint: Blueprint, anatomy: Anatomy) -> None:
    """Raise ValueError where experts are repeated or out of range, or not equally many in every layer."""
    for place, plan in enumerate(blueprint.layers):
        if not anatomy.sparse(plan.host) and (plan.experts or plan.expert_neurons or plan.merged or plan.shared):
            raise ValueError(f"blueprint layer {place}: it keeps experts, and layer {plan.host} has none")
    counts = {len(plan.experts) for plan in blueprint.layers if anatomy.sparse(plan.host)}
    if len(counts) > 1:
        raise ValueError(f"blueprint: layers keep {sorted(counts)} experts; a model has one number for all layers")
    widths = {len(own) for plan in blueprint.layers for own in plan.expert_neurons}
    narrowed = {bool(plan.expert_neurons) for plan in blueprint.layers if anatomy.sparse(plan.host)}
    if len(widths) > 1 or (widths and len(narrowed) > 1):
        raise ValueError("blueprint: experts keep different numbers of neurons; a model has one number for all")
    shared = {len(plan.shared) for plan in blueprint.layers if anatomy.sparse(plan.host)} or {0}
    if len(shared) > 1:
        raise ValueError("blueprint: shared experts keep different numbers of neurons; a model has one number for all")
    if widths or shared != {0}:
        check_expert_neurons(anatomy, max(widths, default=None), max(shared) or None)
    for place, plan in enumerate(blueprint.layers):
        if plan.experts:
            _distinct(f"blueprint layer {place} experts", plan.experts, anatomy.sizes.carried["e"])
        if plan.expert_neurons and len(plan.expert_neurons) != (len(plan.experts) or anatomy.sizes.carried["e"]):
            raise ValueError(f"blueprint layer {place}: not every expert that stays has neurons")
        if plan.merged and (plan.expert_neurons or len(plan.merged) != len(plan.experts)):
            raise ValueError(
                f"blueprint layer {place}: where experts are merged, each that stays is the mean of whole experts"
            )
        if plan.aligned and [len(each) for each in plan.aligned] != [len(each) for each in plan.merged]:
            raise ValueError(f"blueprint layer {place}: aligned does not have one order for each expert of merged")
        for order in (order for each in plan.aligned for order in each):
            if order and sorted(order) != list(range(anatomy.sizes.carried["x"])):
                raise ValueError(f"blueprint layer {place}: aligned has an order that is no permutation of the neurons")
        if plan.shared:
            _distinct(f"blueprint layer {place} neurons of shared experts", plan.shared, anatomy.sizes.carried["y"])
        for own in plan.expert_neurons:
            _distinct(f"blueprint layer {place} neurons of experts", own, anatomy.sizes.carried["x"])


def check_expert_neurons(anatomy: Anatomy, inner: int | None, shared: int | None) -> None:
    """Raise ValueError, naming the setting, where a student cannot have `inner` neurons in each routed expert and
    `shared` in the shared ones; None: the source's."""
    kind, carried = anatomy.family.model_type, anatomy.sizes.carried
    named = {"expert_neurons": inner, "shared_neurons": shared}
    (name, wanted), *_ = ((name, value) for name, value in named.items() if value is not None)
    if anatomy.routing is None:
        raise ValueError(f"shape.{name}: model_type {kind!r} has no experts; leave shape.{name} unset")
    if shared is not None and anatomy.shared_writer is None:
        raise ValueError("shape.shared_neurons: the model has no shared experts; leave shape.shared_neurons unset")
    for setting, axis in (("expert_neurons", "x"), ("shared_neurons", "y")):
        value = named[setting]
        if value is not None and not 1 <= value <= carried[axis]:
            raise ValueError(
                f"shape.{setting}: {value} is outside 1..{carried[axis]} (the teacher's); choose a number of these"
            )
    whole = carried["y"] if anatomy.shared_writer else None
    fault = narrowing_of(anatomy.family).fault(inner or carried["x"], shared or whole)
    if fault is not None:
        raise ValueError(f"shape.{name}: {wanted}, but config.json's {fault}")


def _check_attention(blueprint: Blueprint, anatomy: Anatomy) -> None:
    """Raise ValueError where layers of other kinds stay, and none with attention, which a class's cache needs; where
    a layer whose results later ones reuse does not stay; and where layers of such a model change their order."""
    output = f"{anatomy.writer('n d')}.weight"
    hosts = [plan.host for plan in blueprint.layers]
    for layer, reason in anatomy.required_layers.items():
        if layer not in hosts:
            raise ValueError(
                f"plan.depth: layer {layer} of model_type {anatomy.family.model_type!r} must stay, and the plan "
                f"removes it: {reason}; choose other layers"
            )
    if anatomy.required_layers and hosts != sorted(hosts):
        raise ValueError(
            f"blueprint: its layers are {hosts}, and layers of model_type {anatomy.family.model_type!r} reuse results "
            "of earlier ones; sort them"
        )
    with_attention = {layer for layer in range(len(anatomy.sizes.layers)) if anatomy.has(output, layer)}
    if anatomy.family.lengths_by_type:
        kinds = [kind.partition(",")[0] for kind in anatomy.layer_types]
        with_attention = {layer for layer, kind in enumerate(kinds) if kind not in anatomy.family.lengths_by_type}
    if with_attention and with_attention.isdisjoint(plan.host for plan in blueprint.layers if plan.groups):
        raise ValueError(
            f"shape.layers: of the layers with attention ({', '.join(map(str, sorted(with_attention)))}) none stays; "
            "keep one of them, or more layers"
        )


def _check_sublayers(blueprint: Blueprint, anatomy: Anatomy) -> None:
    """Raise ValueError where no layer keeps its FFN, or no layer of the first one's kind its attention: the classes
    read the length of the KV cache where the first layer, or the first of its kind, writes it."""
    if not any(plan.neurons for plan in blueprint.layers) and any(w.neurons for w in anatomy.sizes.layers):
        raise ValueError("shape.ffn_layers: no layer keeps its FFN; keep one")
    kinds = [anatomy.layer_types[plan.host].partition(",")[0] for plan in blueprint.layers]
    if not any(plan.groups for plan, kind in zip(blueprint.layers, kinds, strict=True) if kind == kinds[0]):
        raise ValueError(
            f"shape.attention_layers: no layer of the first one's kind ({kinds[0]}) keeps its attention, by which the "
            "KV cache is counted; keep one, or raise plan.keep_first"
        )


def check_axis(anatomy: Anatomy, axis: str) -> None:
    """Raise ValueError if a model of this family cannot have fewer of an axis (`layers`, `hidden`, `heads`, ...)."""
    if axis in anatomy.family.kept:
        raise ValueError(
            f"shape.{axis}: model_type {anatomy.family.model_type!r} keeps its {axis}: {anatomy.family.kept[axis]}; "
            f"leave shape.{axis} unset"
        )


def _cut_axes(blueprint: Blueprint, sizes: Sizes) -> Iterator[str]:
    """Yield the axes of which the student does not have all; donated groups count as cut groups."""
    if len(blueprint.layers) != len(sizes.layers):
        yield "layers"
    if blueprint.channels != tuple(range(sizes.hidden)):
        yield "hidden"
    for plan in blueprint.layers:
        whole = whole_layer(sizes, plan.host)
        if whole.groups and not plan.groups:
            yield "attention_layers"
        elif len(plan.groups) != len(whole.groups) or any(group.layer != plan.host for group in plan.groups):
            yield "groups"
        if plan.groups and plan.groups != whole.groups:
            yield "heads"
        if whole.neurons and not plan.neurons:
            yield "ffn_layers"
        elif len(plan.neurons) != len(whole.neurons):
            yield "neurons"


def everything(sizes: Sizes) -> Blueprint:
    """Return the plan that keeps the whole model."""
    return Blueprint(tuple(range(sizes.hidden)), tuple(whole_layer(sizes, layer) for layer in range(len(sizes.layers))))


def whole_layer(sizes: Sizes, layer: int) -> LayerPlan:
    """Return the plan of a layer that keeps the whole source layer."""
    widths = sizes.layers[layer]
    each = widths.each
    groups = tuple(Group(layer, kv, tuple(range(kv * each, (kv + 1) * each))) for kv in range(widths.groups))
    return LayerPlan(layer, groups, tuple(range(widths.neurons)))


def compose(first: Blueprint, second: Blueprint) -> Blueprint:
    """Return one plan, in the indices of the first's source, of what `second` takes from the student of `first`.

    Cutting by it equals cutting twice, except for a gain over the head size (QK-norm) of a layer with donated groups,
    which follows one source layer at each cut.
    """
    tokens = tuple(first.vocabulary[token] for token in second.vocabulary) if first.vocabulary else second.vocabulary
    return Blueprint(
        tuple(first.channels[channel] for channel in second.channels),
        tuple(_composed(first, plan) for plan in second.layers),
        tokens or first.vocabulary,
    )


def _composed(first: Blueprint, plan: LayerPlan) -> LayerPlan:
    host = first.layers[plan.host]
    groups = []
    for taken in plan.groups:
        group = first.layers[taken.layer].groups[taken.kv]
        begin = taken.kv * len(group.heads)  # heads of a layer are ordered by group
        groups.append(Group(group.layer, group.kv, tuple(group.heads[head - begin] for head in taken.heads)))
    neurons = tuple(host.neurons[neuron] for neuron in plan.neurons)
    experts = tuple(host.experts[expert] for expert in plan.experts) if host.experts else plan.experts
    inner = plan.expert_neurons
    if host.expert_neurons:
        stay = plan.experts or range(len(host.expert_neurons))
        own = [host.expert_neurons[expert] for expert in stay]
        inner = tuple(tuple(each[i] for i in kept) for each, kept in zip(own, inner or map(range, map(len, own))))
    shared = tuple(host.shared[neuron] for neuron in plan.shared) if host.shared and plan.shared else plan.shared
    return LayerPlan(
        host.host,
        tuple(groups),
        neurons,
        experts or host.experts,
        inner,
        *composed_merges(host, plan),
        shared or host.shared,
    )


def _distinct(what: str, indices: tuple[int, ...], length: int) -> None:
    if len(set(indices)) != len(indices) or any(not 0 <= index < length for index in indices):
        raise ValueError(f"{what} has a repeated index or one outside 0..{length - 1}")
    if not indices:
        raise ValueError(f"{what} is empty")
