"""`config.json` of a student: the source's, edited field by field where a width, the depth or the class changed."""

from collections.abc import Mapping
from typing import Any

from pipeline.model.anatomy import Anatomy, LayerSizes, Sizes
from pipeline.model.blueprint import Blueprint
from pipeline.model.families import FAMILIES

PER_LAYER_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")


def student_config(config: Mapping[str, Any], source: Anatomy, blueprint: Blueprint) -> dict[str, Any]:
    """Give the student's config.json: stock where its layers are equal, with a `pruned` section where they are not.

    Raises ValueError if the family's config class would refuse the widths.
    """
    student = blueprint.student(source)
    hosts = [plan.host for plan in blueprint.layers]
    said = _said(source, student)
    edited = dict(config)
    edited |= {
        "num_hidden_layers": len(hosts),
        "hidden_size": student.sizes.hidden,
        "num_attention_heads": said.heads,
        "num_key_value_heads": said.groups,
        "intermediate_size": said.neurons,
        "head_dim": student.sizes.head_size,
    }
    for field in PER_LAYER_LISTS:
        if isinstance(config.get(field), list):
            edited[field] = [config[field][host] for host in hosts]
    for field in ("pruned", "auto_map"):  # of the source, where it was a student of its own form
        edited.pop(field, None)
    edited |= class_fields(edited, student)
    pruned = _pruned(config, edited, student)
    return edited | ({"pruned": pruned} if pruned else {})


def _said(source: Anatomy, student: Anatomy) -> LayerSizes:
    """Give the widths for the fields that say one for all layers: the widest layer's.

    Where layers differ each has its own, and these need only be what the class accepts: other layers' or the source's.
    """
    ranked = sorted(student.sizes.layers, key=lambda widths: (widths.heads, widths.groups, widths.neurons))[::-1]
    choices = ranked if student.sizes.uniform else (*ranked, *source.sizes.layers)
    return next((w for w in choices if accepts_heads(student, student.sizes.hidden, w.heads)), ranked[0])


def accepts_heads(student: Anatomy, hidden: int, heads: int) -> bool:
    """Whether the family's config class, or that of the same network under another name, takes this many heads."""
    return not needs_even_heads(student) or hidden % heads == 0


def needs_even_heads(student: Anatomy, biased: bool = False) -> bool:
    """Whether the family's config class refuses hidden sizes that are no multiple of the heads, and no other class has
    the same network; `biased`: as the network will be with every bias its class can have."""
    family = student.family
    return family.even_heads and (family.uneven is None or biased or _biased(student))


def _biased(student: Anatomy) -> bool:
    return any(name.endswith("bias") for name in student.optional)


def class_fields(config: Mapping[str, Any], student: Anatomy) -> dict[str, Any]:
    """Give the class fields: the family's own, or the same network under a name that accepts the widths."""
    family = student.family
    if family.even_heads and config["hidden_size"] % config["num_attention_heads"]:
        if not accepts_heads(student, config["hidden_size"], config["num_attention_heads"]):
            raise ValueError(
                f"shape.hidden is {config['hidden_size']}, not a multiple of shape.heads "
                f"({config['num_attention_heads']}): "
                f"{family.architecture}{' with biases' if _biased(student) else ''} refuses it; choose a multiple"
            )
        family = FAMILIES[family.uneven]
        return {"model_type": family.model_type, "architectures": [family.architecture], "sliding_window": None}
    return {"architectures": [family.architecture]}


def _pruned(config: Mapping[str, Any], edited: Mapping[str, Any], student: Anatomy) -> dict[str, Any] | None:
    """Give what a stock class cannot say: layers of their own widths, and post-norms frozen to scales."""
    pruned = {} if student.sizes.uniform else per_layer(edited, student)
    if config.get("pruned", {}).get("scales"):
        pruned["scales"] = frozen_modules(student)
    return {"base": edited["architectures"][0], **pruned} if pruned else None


def per_layer(config: Mapping[str, Any], student: Anatomy) -> dict[str, Any]:
    """Give the entries of a `pruned` section that tell each layer's widths, where `config` says one for all."""
    return {
        "layers": [vars(widths) for widths in student.sizes.layers],
        "shapes": own_shapes(config, student),
        "attention": {
            f"model.layers.{i}.self_attn": {"num_attention_heads": w.heads, "num_key_value_heads": w.groups}
            for i, w in enumerate(student.sizes.layers)
        },
    }


def own_shapes(config: Mapping[str, Any], student: Anatomy) -> dict[str, list[int]]:
    """Give the tensors whose shape differs from what the config's single widths would make."""
    widths = LayerSizes(config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"])
    stock = student.narrowed(
        Sizes(
            student.sizes.vocabulary,
            student.sizes.hidden,
            student.sizes.head_size,
            (widths,) * len(student.sizes.layers),
        ),
        student.layer_types,
    ).shapes()
    return {name: list(shape) for name, shape in student.shapes().items() if stock[name] != shape}


def frozen_modules(anatomy: Anatomy) -> list[str]:
    """Give the names of all post-norm modules."""
    return [
        f"model.layers.{layer}.{norm}"
        for layer in range(len(anatomy.sizes.layers))
        for norm in anatomy.family.post_norms
    ]


def with_scales(config: Mapping[str, Any], anatomy: Anatomy) -> dict[str, Any]:
    """Give the config of the same model with every post-norm frozen to a static scale."""
    pruned = config.get("pruned", {}) | {"base": anatomy.family.architecture, "scales": frozen_modules(anatomy)}
    return dict(config) | {"pruned": pruned}


def folded_config(config: Mapping[str, Any], anatomy: Anatomy) -> dict[str, Any]:
    """Give the config of the model whose static scales were folded into the projections before them.

    Raises ValueError if the family has no class without post-norms.
    """
    if anatomy.family.folded is None:
        raise ValueError(f"model_type {anatomy.family.model_type!r} has no class without post-norms to fold into")
    family = FAMILIES[anatomy.family.folded]
    edited = dict(config) | {"model_type": family.model_type, "architectures": [family.architecture]}
    pruned = {key: value for key, value in edited.pop("pruned", {}).items() if key not in ("scales", "base")}
    return edited | ({"pruned": {"base": family.architecture, **pruned}} if pruned else {})
