"""The forms a student can be exported in: the config.json of each, and the widths its layers must be padded to."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.model.anatomy import Anatomy
from pipeline.model.hf_config import accepts_heads, class_fields, stated_widths
from pipeline.model.sizes import LayerSizes, Sizes

OWN_FILE = "modeling_pruned.py"
OWN_CLASS = "PrunedForCausalLM"
OWN_CONFIG = "PrunedConfig"  # of a network whose model_type is not the stock class's


def stock(config: Mapping[str, Any], student: Anatomy) -> tuple[dict[str, Any], Sizes]:
    """Return the config unchanged: the class that transformers has for it."""
    return dict(config), student.sizes


def own(config: Mapping[str, Any], student: Anatomy) -> tuple[dict[str, Any], Sizes]:
    """Return the config that loads by our modelling file, which travels in the folder; every layer keeps its widths."""
    pruned = config.get("pruned", {}) | {"base": student.family.architecture}
    classes = {"AutoModelForCausalLM": OWN_CLASS} | ({"AutoConfig": OWN_CONFIG} if pruned.get("scales") else {})
    mapped = {auto: f"{OWN_FILE.removesuffix('.py')}.{name}" for auto, name in classes.items()}
    return dict(config) | {"pruned": pruned, "architectures": [OWN_CLASS], "auto_map": mapped}, student.sizes


def padded(config: Mapping[str, Any], student: Anatomy) -> tuple[dict[str, Any], Sizes]:
    """Return the config of the stock class with one width for all layers, the least that holds each of them.

    ValueError if the student has static scales, or if no number of heads suits its class.
    """
    check_padded(config)
    widths = _common_widths(student)
    layers = tuple(
        replace(widths, neurons=widths.neurons * w.neuron_factor, neuron_factor=w.neuron_factor)
        for w in student.sizes.layers
    )
    kept = {key: value for key, value in config.items() if key not in ("pruned", "auto_map")}
    edited = kept | stated_widths(student, widths)
    return edited | class_fields(edited, student), replace(student.sizes, layers=layers)


def check_padded(config: Mapping[str, Any]) -> None:
    """Raise ValueError, one line, where no stock class computes this config's network."""
    refuse_scales(config, "padded")


def refuse_scales(config: Mapping[str, Any], form: str) -> None:
    """Raise ValueError where static scales replace post-norms: no class but ours has them."""
    if config.get("pruned", {}).get("scales"):
        raise ValueError(
            f"export.form is {form}, and {config['architectures'][0]} has no class without its post-norms, which were "
            "absorbed into static scales; set export.form=own, or reinit.absorb=false and recover again"
        )


def least(layers: tuple[LayerSizes, ...]) -> tuple[int, int]:
    """Return the least numbers of KV groups and of heads per group that hold every layer."""
    return max(w.groups for w in layers), max(w.each for w in layers)


def _common_widths(student: Anatomy) -> LayerSizes:
    layers, hidden = student.sizes.layers, student.sizes.hidden
    groups, each = least(layers)
    neurons = max(w.for_config.neurons for w in layers)
    if accepts_heads(student, hidden, groups * each):
        return LayerSizes(groups * each, groups, neurons)
    grids = [(k, q) for k in range(groups, hidden + 1) for q in range(each, hidden // k + 1)]
    fitting = [(k * q + k, k, q) for k, q in grids if accepts_heads(student, hidden, k * q)]
    if not fitting:
        raise ValueError(
            f"export.form is padded: all layers together need {groups} KV groups of {each} heads, and "
            f"{student.family.architecture} takes only numbers of heads that divide the hidden size {hidden}; "
            "set export.form=own"
        )
    _, k, q = min(fitting)
    return LayerSizes(k * q, k, neurons)


def padding(student: Anatomy, wide: Sizes) -> dict[str, Any] | None:
    """Return what padding to `wide` costs, [student, exported] each; None if nothing is padded.

    `parameters` of the model, `kv_values_per_token` (keys and values cached for one token), and every padded layer.
    """
    layers = []
    for layer, (narrow, wider) in enumerate(zip(student.sizes.layers, wide.layers)):
        grown = {axis: [n, wider.entry[axis]] for axis, n in narrow.entry.items() if n != wider.entry[axis]}
        if grown:
            layers.append({"layer": layer, **grown})
    if not layers:
        return None
    both = (student, student.narrowed(wide, student.layer_types))
    return {
        "parameters": [anatomy.parameters()[0] for anatomy in both],
        "kv_values_per_token": [_cached(anatomy.sizes) for anatomy in both],
        "layers": layers,
    }


def _cached(sizes: Sizes) -> int:
    return 2 * sizes.head_size * sum(widths.groups for widths in sizes.layers)
