"""The model types this project knows, as tables. A family is data: no code asks which family it handles.

To add a type whose parts are known: one entry in a file of this package, one tiny model in `tests/tiny_configs.py`, and
`docs/models.md`, which `python -m tests.models_page` writes.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.model.families.dense import DENSE
from pipeline.model.families.experts import EXPERTS
from pipeline.model.families.gemma4 import GEMMA4
from pipeline.model.families.gpt import GPT
from pipeline.model.families.gpt_neox import GPT_NEOX
from pipeline.model.families.hybrid import HYBRID
from pipeline.model.families.kimi_linear import KIMI_LINEAR
from pipeline.model.families.llama4 import LLAMA4
from pipeline.model.families.mixtures import MIXTURES
from pipeline.model.families.other import OTHER
from pipeline.model.families.refused import REFUSED
from pipeline.model.families.table import AXES, Family
from pipeline.model.families.wrappers import WRAPPERS, Wrapper

__all__ = ["AXES", "FAMILIES", "REFUSED", "WRAPPERS", "Family", "Wrapper", "family_for", "family_of"]

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (*DENSE, *OTHER, *GEMMA4, *GPT, *GPT_NEOX, *EXPERTS, *MIXTURES, *LLAMA4, *HYBRID, *KIMI_LINEAR)
}


def family_of(model_type: str) -> Family:
    """Return the table of a `config.json` model_type. ValueError if there is none, with the reason if one is known."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise ValueError(f"model_type {model_type!r} has no table: {REFUSED[model_type]}; see docs/models.md")
    raise ValueError(
        f"model_type {model_type!r} has no table; docs/models.md lists those that have one. A new table needs, in "
        "pipeline/model/families: the names of a layer's tensors with their axes (v h n k d f), which projections each "
        "norm feeds or follows, and whether gains are stored as 1+w"
    )


def family_for(config: Mapping[str, Any]) -> Family:
    """Return the table for a config: that of its model_type, in the variant for its settings.

    ValueError for an unknown type, and for a setting that no variant was made for.
    """
    family = family_of(config["model_type"])
    tables = (*family.variants, family)
    for table in tables:
        if all(config.get(name) in values for name, values in table.requires.items()):
            return table
    names = sorted(
        {name for table in tables for name in table.requires if config.get(name) not in table.requires[name]}
    )
    name = names[0]
    values = sorted({str(value) for table in tables for value in table.requires.get(name, ()) if value is not None})
    raise ValueError(
        f"config.json: {name} is {config.get(name)!r}; model_type {family.model_type!r} is supported with "
        f"{name} {' or '.join(values)} only"
    )
