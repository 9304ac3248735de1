"""The names of stored tensors: what transformers accepts besides the names of a family's table."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.model.families import family_for
from pipeline.model.sizes import reusing_layers

BUFFERS = r"rotary_emb\.inv_freq$"  # stored by old versions, computed by the class
PREDICTION = re.compile(r"(^|[._])mtp([._]|$)")  # multi-token prediction, by name
NUMBERED = re.compile(r"(?:model\.)?layers\.(\d{1,6})\.(.+)")
MARKS = ("eh_proj", "enorm", "hnorm")  # modules that only a layer of multi-token prediction has


def canonical_names(stored: Iterable[str], config: Mapping[str, Any], folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return the stored name by the table's name of each tensor, and the names of those that are left out.

    Left out are buffers that the class computes, layers of multi-token prediction, which transformers' classes do not
    have, and the keys and values of layers that reuse those of earlier ones. A base model saved alone lacks the prefix
    of its module (`model.`), which is added. Raise ValueError where two stored names are those of one tensor.
    """
    family = family_for(config)
    own: dict[str, str] = {}
    for name in stored:
        first = own.setdefault(family.named(name), name)
        if first != name:
            raise ValueError(
                f"{folder}: {first!r} and {name!r} are two names of one tensor; remove the one that is not used"
            )
    stored = list(own)
    count = family.width(config, "layers")
    beyond = _prediction_layers(stored, count)
    ignored = re.compile("|".join((BUFFERS, *family.left_out)))
    buffers = {name for name in stored if ignored.search(name)}
    beside = {name for name in stored if name not in buffers and (PREDICTION.search(name) or _layer(name) in beyond)}
    kept = [name for name in stored if name not in buffers and name not in beside]
    left_out = [own[name] for name in stored if name in beside]
    base = family.prefix.partition(".")[0] + "."
    bare = not any(name.startswith(base) for name in kept)
    names = {base + name if bare and not name.startswith(f"{family.head}.") else name: own[name] for name in kept}
    reusing = [family.prefix.format(layer=layer) for layer in reusing_layers(config, family, count)]
    unused = tuple(prefix + part for prefix in reusing for part in family.reused)
    left_out += [names.pop(name) for name in list(names) if name.startswith(unused)]
    return names, left_out


def _prediction_layers(stored: list[str], count: int) -> set[int]:
    """Return the numbers of layers beyond the model's own that are marked as layers of multi-token prediction."""
    marked = (NUMBERED.fullmatch(name) for name in stored)
    found = {int(match[1]) for match in marked if match and match[2].split(".")[0] in MARKS}
    return {number for number in found if number >= count}


def _layer(name: str) -> int | None:
    match = NUMBERED.fullmatch(name)
    return int(match[1]) if match else None
