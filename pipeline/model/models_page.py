"""docs/models.md: the model types with a table and the axes that students of each can have fewer of."""

import json
from collections.abc import Iterable

from pipeline.model.families import AXES, FAMILIES, REFUSED, WRAPPERS, Family, Wrapper
from pipeline.model.families.table import SUBLAYERS

HEAD = """# Models

Generated from `pipeline/model/families` by `python -m tests.models_page`; a test compares it with the tables.

Of the {total} types that transformers loads as causal language models, {accepted} have a table. A type is the
`model_type` of `config.json`. Laws that the tests hold every type to, in float64 on tiny models of the stock class:
keeping everything is bit-identical; a student computes what the masked model computes, for every axis; the stock class
reloads it without missing or unexpected tensors; SLNP keeps the L2 norm of every gain; parameters are counted right.

## Types with a table

The columns are the axes of `shape.*`. `with heads` and `with hidden`: hidden channels and heads change together, since
the class computes the head size as hidden size / heads. `own widths`: the class computes the neurons from the hidden
size, so a student with fewer is written in the form `own`. `attention` and `FFN`: a layer can lose this sub-layer alone
(`shape.attention_layers`, `shape.ffn_layers`). `no`: the reason is listed below. Basis rotation
(`rotate.kind`) needs RMSNorm, no post-norms and no experts. `-` under experts: there are none. In parentheses: config
fields by which a type has several tables; a table with other columns has a row of its own.

| type | layers | hidden | heads | groups | neurons | attention | FFN | experts | basis rotation |
|---|---|---|---|---|---|---|---|---|---|
"""

WRAPPED = """
## Image-text models

The text half is pruned and recovered on text; the vision tower is carried, and the projector follows the hidden
channels. The exported folder is one of the image-text class, in the form `stock` or `padded`. Laws: keeping everything
is bit-identical; a student computes what the masked model computes, for text and for text with an image. In
transformers 5.24 the forward of `Llama4ForConditionalGeneration` ends in an error (it reads `image_outputs` of an
output that has no such field); for it the laws are tested with that field added.

| type | class | text half |
|---|---|---|
"""


def models_page(types: Iterable[str]) -> str:
    """Return the page for the model types of a transformers installation.

    ValueError for a type that has neither a table nor a reason why not.
    """
    types = sorted(types)
    unknown = [name for name in types if name not in {*FAMILIES, *REFUSED, *WRAPPERS}]
    if unknown:
        raise ValueError(f"pipeline/model/families: no table and no reason for {', '.join(unknown)}; add one of them")
    accepted = [FAMILIES[name] for name in types if name in FAMILIES]
    lines = [HEAD.format(total=len(types), accepted=len(accepted))]
    lines += [f"| {name} | {' | '.join(cells)} |\n" for family in accepted for cells, name in _rows(family).items()]
    lines.append("\n## Axes that a type keeps\n\n")
    for family in accepted:
        reasons: dict[str, list[str]] = {}
        for axis, reason in family.kept.items():
            reasons.setdefault(reason, []).append(axis)
        lines += [f"- `{family.model_type}` keeps its {', '.join(axes)}: {why}.\n" for why, axes in reasons.items()]
        if family.keeps_last:
            lines.append(f"- `{family.model_type}` keeps its last layer: {family.keeps_last}.\n")
        if family.reused:
            parts = ", ".join(prefix.rstrip(".") for prefix in family.reused)
            lines.append(f"- `{family.model_type}` keeps layers whose results ({parts}) later layers reuse.\n")
    lines.append(WRAPPED)
    lines += [f"| `{each.model_type}` | `{each.architecture}` | {_texts(each)} |\n" for each in WRAPPERS.values()]
    lines.append("\n## Types without a table\n\n")
    groups: dict[str, list[str]] = {}
    for name in (*types, *sorted(REFUSED.keys() - set(types))):
        if name not in FAMILIES and name not in WRAPPERS:
            groups.setdefault(REFUSED[name], []).append(f"`{name}`")
    lines += [f"- {', '.join(names)}: {reason}.\n" for reason, names in sorted(groups.items())]
    return "".join(lines)


def _texts(wrapper: Wrapper) -> str:
    named = ", ".join(f"`{own}`" + (f", as `{table}`" if table != own else "") for own, table in wrapper.texts.items())
    return named or "a type above whose layers are `model.layers`"


def _rows(family: Family) -> dict[tuple[str, ...], str]:
    """Return the rows of a type: the name in each by its columns."""
    fields = sorted({name for table in (family, *family.variants) for name in table.requires})
    rows = {tuple(_cells(family)): f"`{family.model_type}`" + (f" ({', '.join(fields)})" if family.variants else "")}
    for table in sorted(family.variants, key=lambda table: len(table.requires)):
        values = (f"`{field}: {json.dumps(values[0])}`" for field, values in table.requires.items())
        rows.setdefault(tuple(_cells(table)), f"`{family.model_type}` with {', '.join(values)}")
    return rows


def _cells(family: Family) -> Iterable[str]:
    for axis in AXES:
        if axis in family.fixed:
            yield "no"
        elif family.whole_heads and axis in ("hidden", "heads", "groups"):
            yield "with heads" if axis == "hidden" else "with hidden"
        elif axis == "neurons" and family.field("neurons") is None:
            yield "own widths"
        else:
            yield "yes"
    for axis in SUBLAYERS:
        yield "yes" if axis in family.sublayers else "no"
    yield "yes" if family.experts else "-"
    plain = family.pre_norms and not (family.experts or family.layer_norm or family.post_norms)
    yield "yes" if plain and "hidden" not in family.fixed else "no"
