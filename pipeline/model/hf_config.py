"""`config.json` of a student: the source's, edited field by field where a width, the depth or the class changed."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint
from pipeline.model.families import FAMILIES, Family
from pipeline.model.layer_types import PER_LAYER_LISTS
from pipeline.model.mixture import narrowing_of
from pipeline.model.sizes import LayerSizes, fields_by_layer, reusing_layers
from pipeline.model.token_ids import Renumbering


def student_config(config: Mapping[str, Any], source: Anatomy, blueprint: Blueprint) -> dict[str, Any]:
    """Return the student's config.json: a stock one where its layers are equal, else with a `pruned` section.

    Raises ValueError if the family's config class would refuse the widths.
    """
    student = blueprint.student(source)
    hosts = [plan.host for plan in blueprint.layers]
    edited = dict(config) | stated_widths(student, _stated(source, student))
    for field in PER_LAYER_LISTS:
        if isinstance(config.get(field), list):
            edited[field] = [config[field][host] for host in hosts]
    for field, kinds in source.family.layer_groups.items():
        edited[field] = [[[config[kinds][host] for host in hosts], 1]]
    if source.family.reusing:
        reusing = reusing_layers(config, source.family, len(source.sizes.layers))
        edited[source.family.reusing] = sum(host in reusing for host in hosts)
    for field in source.family.repeated:
        edited[field] = [config[field][host % len(config[field])] for host in hosts]
    for field in source.family.depth_scaled:
        edited[field] = config[field] * math.sqrt(len(hosts) / len(source.sizes.layers))
    for field in source.family.layer_indices:
        if config.get(field) is not None:
            edited[field] = [place for place, host in enumerate(hosts) if host in config[field]]
    edited |= _expert_fields(config, source, blueprint)
    if blueprint.vocabulary:
        edited = Renumbering.of(blueprint.vocabulary, source.sizes.vocabulary).fields(edited)
    for field in ("pruned", "auto_map", *source.family.superseded):  # of a source that was a student itself
        edited.pop(field, None)
    edited |= _fields_by_layer(config, source.family, hosts)
    edited |= class_fields(edited, student)
    pruned = _pruned(config, edited, student)
    return edited | ({"pruned": pruned} if pruned else {})


def _fields_by_layer(config: Mapping[str, Any], family: Family, hosts: list[int]) -> dict[str, Any]:
    """Return the fields that single layers of a student have of their own, and those that state them for all of these,
    for readers of older files."""
    if not family.layer_fields:
        return {}
    own = fields_by_layer(config, family)
    kept = {str(place): own[host] for place, host in enumerate(hosts) if host in own}
    values = {field: {fields.get(field) for fields in kept.values()} for field in family.shared_fields}
    shared = {family.shared_fields[field]: found.pop() for field, found in values.items() if len(found) == 1}
    return {family.layer_fields: kept} | shared


def _expert_fields(config: Mapping[str, Any], source: Anatomy, blueprint: Blueprint) -> dict[str, int]:
    """Return the config fields of a student's experts: their number, those of a token, and the first dense layers.

    ValueError where fewer experts stay than a token is routed to, or groups of experts would be unequal.
    """
    family, routing = source.family, source.routing
    if routing is None or family.top_k is None:
        return {}
    count, most = blueprint.sizes(source.sizes).carried["e"], source.sizes.carried["e"]
    routing.check(count, most)
    for plan in blueprint.layers if routing.groups > 1 else ():
        members = [sum(expert * routing.groups // most == group for expert in plan.experts)
                   for group in range(routing.groups)]  # fmt: skip
        if plan.experts and (len(set(members)) > 1 or list(plan.experts) != sorted(plan.experts)):
            raise ValueError(
                f"{members} experts of the {routing.groups} groups of {family.expert_groups} stay in a layer, in the "
                f"order {plan.experts}; keep equally many of each, in ascending order"
            )
    fields = {field: count for field in family.experts if config.get(field) is not None}
    if family.leading_dense is not None:
        fields[family.leading_dense] = sum(plan.host < config[family.leading_dense] for plan in blueprint.layers)
    before, after = source.sizes.carried, blueprint.sizes(source.sizes).carried
    if any(after[axis] < before[axis] for axis in "xy" if axis in before):
        fields |= narrowing_of(family).fields(after["x"], after["y"] if source.shared_writer else None)
    return fields | {family.top_k: routing.top}


def stated_widths(student: Anatomy, widths: LayerSizes) -> dict[str, int]:
    """Return the config fields of a student's widths, `widths` being those stated for all layers."""
    family, sizes = student.family, student.sizes
    values = {
        "vocabulary": sizes.vocabulary,
        "layers": len(sizes.layers),
        "hidden": sizes.hidden,
        "heads": widths.heads,
        "groups": widths.groups,
        "neurons": widths.neurons * family.stated_neurons,
        "head_size": sizes.head_size,
    }
    kept = {"heads", "groups", "head_size"} if "heads" in family.fixed else set()
    kept |= {axis for axis in ("neurons", "hidden") if axis in family.fixed}
    fields = {family.field(width): value for width, value in values.items() if width not in kept}
    fields |= {field: values[width] for field, width in family.follows.items()}
    return {field: value for field, value in fields.items() if field is not None}


def _stated(source: Anatomy, student: Anatomy) -> LayerSizes:
    """Return the widths for the config fields that hold one value for all layers: those of the widest layer.

    Where layers differ each has its own, and these need only be values that the class accepts: of another layer, or of
    the source.
    """
    layers = [widths.for_config for widths in student.sizes.layers]
    neurons = max(widths.neurons for widths in layers)
    whole = [replace(w, neurons=w.neurons or neurons) for w in layers if w.groups]
    ranked = sorted(whole, key=lambda widths: (widths.heads, widths.groups, widths.neurons))[::-1]
    choices = ranked if student.sizes.uniform else (*ranked, *(widths.for_config for widths in source.sizes.layers))
    return next((w for w in choices if accepts_heads(student, student.sizes.hidden, w.heads)), ranked[0])


def accepts_heads(student: Anatomy, hidden: int, heads: int) -> bool:
    """Whether the family's config class, or that of the same network under another name, takes this many heads."""
    if student.whole_heads:
        return hidden == heads * student.sizes.head_size
    return not needs_even_heads(student) or hidden % heads == 0


def needs_even_heads(student: Anatomy, biased: bool = False) -> bool:
    """Whether hidden sizes must be a multiple of the heads: the family's config class refuses others, and no other
    class has the same network; `biased`: as the network will be with every bias its class can have."""
    family = student.family
    return student.whole_heads or (family.even_heads and (family.uneven is None or biased or _biased(student)))


def _biased(student: Anatomy) -> bool:
    return any(name.endswith("bias") for name in student.optional)


def class_fields(config: Mapping[str, Any], student: Anatomy) -> dict[str, Any]:
    """Return the class fields: the family's own, or those of the same network under a name that accepts the widths."""
    family = student.family
    hidden, heads = family.width(config, "hidden"), family.width(config, "heads")
    if accepts_heads(student, hidden, heads) and not (family.even_heads and hidden % heads):
        return {"architectures": [family.architecture]}
    if student.whole_heads:
        raise ValueError(
            f"shape.hidden is {hidden} and shape.heads {heads}: {family.architecture} computes the head size as hidden "
            f"size / heads, which must stay {student.sizes.head_size}; change both together"
        )
    if not accepts_heads(student, hidden, heads):
        raise ValueError(
            f"shape.hidden is {hidden}, not a multiple of shape.heads ({heads}): "
            f"{family.architecture}{' with biases' if _biased(student) else ''} refuses it; choose a multiple"
        )
    family = FAMILIES[str(family.uneven)]
    return {"model_type": family.model_type, "architectures": [family.architecture], "sliding_window": None}


def _pruned(config: Mapping[str, Any], edited: Mapping[str, Any], student: Anatomy) -> dict[str, Any] | None:
    """Return what a stock class cannot represent: layers of their own widths, and post-norms frozen to scales."""
    pruned = {} if student.sizes.uniform and not own_shapes(edited, student) else per_layer(edited, student)
    if config.get("pruned", {}).get("scales"):
        pruned["scales"] = frozen_modules(student)
    return {"base": edited["architectures"][0], **pruned} if pruned else None


def per_layer(config: Mapping[str, Any], student: Anatomy) -> dict[str, Any]:
    """Return the entries of a `pruned` section that hold each layer's widths, where `config` has one for all.

    ValueError if the family's attention takes its heads from more than the fields of its config.
    """
    family = student.family
    if family.field("groups") is None and len({w.heads for w in student.sizes.layers if w.groups}) > 1:
        raise ValueError(
            f"plan.widths: {family.architecture} has one number of heads for all layers; set plan.widths=uniform"
        )
    return {
        "layers": [widths.entry for widths in student.sizes.layers],
        "shapes": own_shapes(config, student),
        "attention": {
            f"{family.prefix}{family.attention}".format(layer=i): {
                "num_attention_heads": w.heads,
                "num_key_value_heads": w.groups,
            }
            for i, w in enumerate(student.sizes.layers)
            if w.groups and family.field("groups") is not None and "heads" not in family.fixed
        },
        **removed_sublayers(config, student),
    }


def removed_sublayers(config: Mapping[str, Any], student: Anatomy) -> dict[str, Any]:
    """Return the entries of a `pruned` section for removed sub-layers; none where all layers are whole.

    `removed`: the modules in whose place nothing is added to the residual stream, and their norms. `cache`: the place
    in the KV cache of each attention that has another than its layer's. Within the layers of one kind of attention the
    first places are used, since the classes read there how many tokens are cached.
    """
    family, layers = student.family, range(len(student.sizes.layers))
    gone = {layer: student.removed(layer) for layer in layers}
    if not any(gone.values()):
        return {}
    named = {layer: family.prefix.format(layer=layer) for layer in layers}
    modules = {"attention": family.attention, "ffn": family.ffn}
    removed = {
        kind: [named[layer] + module for layer in layers if module in {each.module for each in gone[layer]}]
        for kind, module in modules.items()
    }
    removed["norms"] = [named[layer] + norm for layer in layers for each in gone[layer] for norm in each.norms]
    kinds = config.get("layer_types") or [None] * len(layers)
    places: dict[str, int] = {}
    for kind in dict.fromkeys(kinds):
        own = [layer for layer in layers if kinds[layer] == kind]
        caching = [layer for layer in own if student.sizes.layers[layer].groups]
        moved = ((layer, place) for place, layer in zip(own, caching) if place != layer)
        places |= {named[layer] + family.attention: place for layer, place in moved}
    return {"removed": removed, "cache": places}


def own_shapes(config: Mapping[str, Any], student: Anatomy) -> dict[str, list[int]]:
    """Return the tensors whose shape differs from what the class makes of the widths that `config` states."""
    family = student.family
    heads = family.width(config, "heads")
    neurons = family.width(config, "neurons") or (family.neurons_per_channel or 0) * student.sizes.hidden
    widths = LayerSizes(heads, family.groups or family.width(config, "groups") or heads, neurons)
    factors = [own.neuron_factor for own in student.sizes.layers]
    layers = tuple(replace(widths, neurons=widths.neurons * each, neuron_factor=each) for each in factors)
    sizes = replace(student.sizes, layers=layers)
    stock = student.narrowed(sizes, student.layer_types).shapes()
    return {name: list(shape) for name, shape in student.shapes().items() if stock[name] != shape}


def frozen_modules(anatomy: Anatomy) -> list[str]:
    """Return the names of all post-norm modules."""
    layers = range(len(anatomy.sizes.layers))
    return [name for layer in layers for name in anatomy.modules(anatomy.family.post_norms, layer)]


def with_scales(config: Mapping[str, Any], anatomy: Anatomy) -> dict[str, Any]:
    """Return the config of the same model with every post-norm frozen to a static scale."""
    pruned = config.get("pruned", {}) | {"base": anatomy.family.architecture, "scales": frozen_modules(anatomy)}
    return dict(config) | {"pruned": pruned}


def folded_config(config: Mapping[str, Any], anatomy: Anatomy) -> dict[str, Any]:
    """Return the config of the model whose static scales were folded into the projections before them.

    Raises ValueError if the family has no class without post-norms.
    """
    if anatomy.family.folded is None:
        raise ValueError(f"model_type {anatomy.family.model_type!r} has no class without post-norms to fold into")
    family = FAMILIES[anatomy.family.folded]
    edited = dict(config) | {"model_type": family.model_type, "architectures": [family.architecture]}
    pruned = {key: value for key, value in edited.pop("pruned", {}).items() if key not in ("scales", "base")}
    return edited | ({"pruned": {"base": family.architecture, **pruned}} if pruned else {})
