"""Bounds of the numbers of a config.json by the names of their fields, checked before a class acts on them."""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.model.anatomy import EXPERT
from pipeline.model.families import Family

TENSORS = 1 << 18  # the most tensors of a model
LAYERS = 1 << 12
INTEGERS = (  # patterns of names, and the largest integer of the first that is found
    (re.compile(r"seed|theta"), 1 << 64),  # of these, no class allocates or repeats anything
    (re.compile(r"positions?(_|$)|length|seq_len|window|context|n_ctx"), 1 << 30),
    (re.compile(r"layers?$|^depth$"), LAYERS),
    (re.compile(r"experts|heads?$|groups?$"), 1 << 14),
    (re.compile(r"chunk_size$"), 1 << 16),  # sequences are filled up to a multiple of it
    (re.compile(""), 1 << 24),
)
POSITIONS, ROTARY = INTEGERS[1]
COUNTED = 1 << 20  # positions of a class that has no rotation
TABULATED = 1 << 16  # positions of a class that computes or stores a value for each, or for each pair
TABLES = ("n_positions", "n_ctx")  # fields of such classes
PROBABILITY = re.compile(r"dropout|pdrop|layerdrop|drop_path_rate")
EPSILON = re.compile(r"(^|_)eps(ilon)?$")


def check_numbers(
    fields: Mapping[str, Any], path: Path, aliases: Mapping[str, str], rotary: bool, stored: Collection[str]
) -> None:
    """Raise ValueError, naming the field of a config.json, for a number that no model has; sections are searched too.

    `aliases` are further names of fields, `rotary` is whether positions are rotations, computed as they are needed, and
    `stored` names fields that are lengths of weights.
    """
    for name, value in fields.items():
        own = aliases.get(name, name)
        most = _most(own)
        if own in TABLES or (own in stored and POSITIONS.search(own)):
            most = TABULATED
        elif most == ROTARY and not rotary:
            most = COUNTED
        _check(value, name, own, most, path)


def _most(name: str) -> int:
    return next(limit for pattern, limit in INTEGERS if pattern.search(name))


def _check(value: Any, place: str, name: str, most: int, path: Path) -> None:
    """Check a number of a field, or all in an array or a section; `place` is the field with its section."""
    if isinstance(value, Mapping):
        for inner, each in value.items():
            _check(each, f"{place}.{inner}", str(inner), _most(str(inner)), path)
    elif isinstance(value, list | tuple):
        for each in value:
            _check(each, place, name, most, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        wanted = None
        if PROBABILITY.search(name) and not 0 <= value <= 1:
            wanted = "a probability"
        elif EPSILON.search(name) and not 0 < value < math.inf:
            wanted = "a finite number above 0"
        elif isinstance(value, int) and abs(value) > most:
            wanted = f"an integer up to {most}"
        elif math.isnan(value):
            wanted = "a number"
        if wanted is not None:
            raise _refusal(path, place, value, wanted)


def check_repeats(fields: Mapping[str, Any], family: Family, path: Path) -> None:
    """Raise ValueError where kinds of layers, in pairs of a list and its repeats, are those of too many layers."""
    for field in family.layer_groups:
        entries = fields.get(field)
        if entries is None:
            continue
        if not isinstance(entries, list) or not all(_repeated(entry) for entry in entries):
            raise _refusal(path, field, entries, "an array of pairs, each of an array of kinds and its repeats")
        if sum(len(kinds) * times for kinds, times in entries) > LAYERS:
            raise _refusal(path, field, entries, f"an array of up to {LAYERS} layers")


def _repeated(entry: Any) -> bool:
    """Whether an entry is a pair of an array and how often it is repeated."""
    pair = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    return isinstance(pair[0], list) and isinstance(pair[1], int) and pair[1] >= 0


def check_length(name: str, entries: list[Any], field: str, count: int, path: Path) -> None:
    """Raise ValueError where a list with an entry for each layer does not have `count`, the value of `field`."""
    if len(entries) != count:
        raise ValueError(
            f"{path}: {name} has {len(entries)} entries and {field} is {count}; keep the entries of the layers that "
            "the weights have"
        )


def check_experts(config: Mapping[str, Any], family: Family, path: Path) -> None:
    """Raise ValueError where a token would be sent to no expert or to more than there are, or the experts have more
    tensors than a model."""
    for table in (family, *family.variants):
        for field in table.experts:
            count = config.get(field)
            if not isinstance(count, int) or count < 1:
                continue
            top = config.get(str(table.top_k))
            for each in top if isinstance(top, list) else [top]:
                if isinstance(each, int) and not 1 <= each <= count:
                    raise _refusal(path, str(table.top_k), top, f"from 1 to the {count} of {field}")
            layers = config[str(table.field("layers"))]
            if any(EXPERT in name for name in table.layer) and layers * count > TENSORS:
                raise _refusal(path, field, count, f"at most {TENSORS} tensors in {layers} layers")


def _refusal(path: Path, place: str, value: Any, wanted: str) -> ValueError:
    found = f"{one_line(place):.160} is {json.dumps(value):.60}"
    return ValueError(f"{path}: {found}, not {wanted}; correct it, or fetch it again")


def one_line(name: str) -> str:
    """Return a name that comes from a file as ASCII text without line breaks."""
    return json.dumps(name)[1:-1]
