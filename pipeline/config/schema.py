"""Describe settings from their types: the dotted key of every setting, what it accepts, and faults in plain words."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel

UNIONS = (Union, UnionType)


def settings_of(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return the annotated type of every setting in `section` and in the sections inside it, by dotted key."""
    found: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = section_in(info.annotation)
        if inner is not None:
            found |= settings_of(inner, f"{key}.")
        else:
            found[key] = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    return found


def section_in(kind: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, also where it may be null instead; None for a plain setting."""
    options = get_args(kind) if get_origin(kind) in UNIONS else (kind,)
    sections = [each for each in options if isinstance(each, type) and issubclass(each, BaseModel)]
    return sections[0] if sections else None


def accepts(kind: Any, wanted: type) -> bool:
    """Return whether a setting of type `kind` accepts a plain value of type `wanted`."""
    if get_origin(kind) is Annotated:
        return accepts(get_args(kind)[0], wanted)
    if get_origin(kind) in UNIONS:
        return any(accepts(each, wanted) for each in get_args(kind))
    return kind is wanted


def lists(kind: Any, wanted: type) -> bool:
    """Return whether a setting of type `kind` accepts a list of plain values of type `wanted`."""
    if get_origin(kind) is Annotated:
        return lists(get_args(kind)[0], wanted)
    if get_origin(kind) in UNIONS:
        return any(lists(each, wanted) for each in get_args(kind))
    return get_origin(kind) is list and accepts(get_args(kind)[0], wanted)


def choices(kind: Any) -> list[str]:
    """Return the words that a setting chooses from, as they are typed; empty where it is free."""
    if get_origin(kind) is Annotated:
        return choices(get_args(kind)[0])
    if get_origin(kind) in UNIONS:
        return [word for each in get_args(kind) for word in choices(each)]
    if get_origin(kind) is Literal:
        return [typed(value) for value in get_args(kind)]
    return ["true", "false"] if kind is bool else []


def typed(value: Any) -> str:
    """Return a plain value as it is typed on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def expected(kind: Any) -> str:
    """Return what a setting of type `kind` accepts, as a phrase: "a whole number of at least 1"."""
    limits: list[Any] = []
    if get_origin(kind) is Annotated:
        kind, *limits = get_args(kind)
    if get_origin(kind) in UNIONS:
        parts = [expected(each) for each in sorted(get_args(kind), key=lambda each: each is NoneType)]
        return ", or ".join(parts)
    if get_origin(kind) is Literal or kind is bool:
        words = choices(kind)
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    if get_origin(kind) in (list, tuple):
        return _expected_list(kind)
    if get_origin(kind) is dict:
        return "a mapping {name: value, ...}"
    if section_in(kind) is not None:
        return "a section of settings"
    noun = {int: "a whole number", float: "a number", str: "text", NoneType: "null"}.get(kind, "a value")
    return noun + _range(_flat(limits))


def _expected_list(kind: Any) -> str:
    elements = get_args(kind)
    if get_origin(kind) is tuple:
        return f"[{', '.join(['...'] * len(elements))}], each {expected(elements[0])}"
    if elements[0] is str:
        return "a list [a, b, ...]"
    return f"a list [a, b, ...], each {expected(elements[0])}"


def _flat(limits: Any) -> Iterator[Any]:
    """Yield the bounds in an annotation's metadata, those inside pydantic's Field included."""
    for limit in limits:
        yield from _flat(limit.metadata) if hasattr(limit, "metadata") else (limit,)


def _range(limits: Iterator[Any]) -> str:
    words = []
    for limit in limits:
        match limit:
            case Ge(ge=bound):
                words.append(f"of at least {bound:g}")
            case Gt(gt=bound):
                words.append(f"above {bound:g}")
            case Le(le=bound):
                words.append(f"of at most {bound:g}")
            case Lt(lt=bound):
                words.append(f"below {bound:g}" if bound < 1e6 else f"below {bound}")
            case MinLen():
                pass
    return f" {' and '.join(words)}".replace("and of ", "and ") if words else ""


def place_of(location: tuple[Any, ...], section: type[BaseModel]) -> tuple[str, Any]:
    """Return the dotted key of the setting that one of pydantic's locations lies in, and its type.

    The names that pydantic adds for the members of a union are left out; an index into a list stays. The type is None
    where the key names no setting.
    """
    key: list[str] = []
    inner: type[BaseModel] | None = section
    kind: Any = section
    for step in location:
        if inner is not None and isinstance(step, str):
            if step == inner.__name__:
                continue
            key.append(step)
            info = inner.model_fields.get(step)
            if info is None:
                return ".".join(key), None
            kind = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
            inner = section_in(info.annotation)
        elif isinstance(step, int):
            key.append(str(step))
            break
    return ".".join(key), kind


def plain(faults: Sequence[Mapping[str, Any]], section: type[BaseModel], unknown: Any) -> list[str]:
    """Return pydantic's faults as lines "setting: what is wrong; what to do", one per setting.

    `unknown`: a function that returns the line for a key that is no setting.
    """
    lines: dict[str, str] = {}
    for fault in faults:
        key, kind = place_of(fault["loc"], section)
        if fault["type"] == "value_error":
            text = str(fault["ctx"]["error"])
            line = f"{key}: {text}" if key else text
        elif fault["type"] == "extra_forbidden":
            line = unknown(".".join(map(str, fault["loc"])))
        elif fault["type"] == "missing":
            line = f"{key}: missing; give {expected(kind)}"
        else:
            near = get_close_matches(str(fault["input"]), choices(kind), n=1)
            meant = f"did you mean {near[0]!r}? give" if near else "give"
            line = f"{key}: {_shown(fault['input'])} is not valid; {meant} {expected(kind)}"
        lines.setdefault(key, line)
    return list(dict.fromkeys(lines.values()))


def _shown(value: Any) -> str:
    quoted = f"'{value}'" if isinstance(value, str) and value.isprintable() else repr(value)
    text = quoted if isinstance(value, str) else typed(value)
    return text if len(text) <= 60 else text[:57] + "..."
