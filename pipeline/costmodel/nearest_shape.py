"""A requested shape: whether it can be cut from the teacher, and the nearest ones that can."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import gcd, lcm

from pipeline.costmodel.shapes import AXES, WIDTHS, ModelShape


def given_shape(teacher: ModelShape, requested: Mapping[str, int | None]) -> ModelShape:
    """Return the requested shape, the teacher's value where it is null.

    Raise ValueError, naming the nearest possible shapes, for one that cannot be cut.
    """
    unknown = sorted(set(requested) - set(AXES))
    if unknown:
        raise ValueError(f"shape has no axis {unknown}; it has {list(AXES)}")
    values = {axis: requested.get(axis) or getattr(teacher, axis) for axis in AXES}
    fault = _fault(teacher, values)
    if fault:
        near = "; ".join(_words(shape) for shape in possible_near(teacher, requested))
        raise ValueError(f"{fault}. Nearest possible shapes: {near}")
    return teacher.changed(values)


def possible_near(
    teacher: ModelShape, requested: Mapping[str, int | None], count: int = 3, least: ModelShape | None = None
) -> list[ModelShape]:
    """Return the `count` possible shapes nearest to a request, nearest first, by the changes relative to the teacher.

    Possible means that it can be cut from the teacher, and `least`, itself possible, from it. Alignment is not
    required: a requested width is kept, but for a hidden size that the student's class would refuse.
    """
    wanted = {axis: requested.get(axis) or getattr(teacher, axis) for axis in AXES}
    floor = least.axes() if least else dict.fromkeys(AXES, 1)
    clipped = {axis: min(max(value, floor[axis]), getattr(teacher, axis)) for axis, value in wanted.items()}
    for axis in teacher.fixed:
        clipped[axis] = getattr(teacher, axis)
    queries = range(floor["heads"] // floor["groups"], teacher.heads // teacher.groups + 1)
    pairs = [(k * each, k) for k in range(floor["groups"], teacher.groups + 1) for each in queries]
    if {"heads", "groups"} & teacher.fixed.keys():
        pairs = [(teacher.heads, teacher.groups)]
    wide = [replace(teacher, **{**clipped, "heads": heads, "groups": groups}) for heads, groups in pairs]
    shapes = [shape for each in wide for shape in _accepted_near(each, floor["hidden"], teacher.hidden)]
    shapes.sort(
        key=lambda shape: (
            abs(shape.heads - wanted["heads"]) / teacher.heads
            + abs(shape.groups - wanted["groups"]) / teacher.groups
            + abs(shape.hidden - clipped["hidden"]) / teacher.hidden,
            -shape.heads,
            -shape.groups,
            -shape.hidden,
        )
    )
    return shapes[:count]


def _accepted_near(shape: ModelShape, least: int, most: int) -> Iterator[ModelShape]:
    """Return the shape or, where its class refuses it, that of the next hidden sizes it takes, within `least` and
    `most`.

    These are as well aligned as the refused one, up to the edge of the matrix unit; beside them the ends themselves.
    """
    if shape.accepted:
        yield shape
        return
    if shape.whole_heads:
        other = replace(shape, hidden=shape.heads * shape.head_size)
        if least <= other.hidden <= most:
            yield other
        return
    steps = {lcm(heads, gcd(shape.hidden, WIDTHS[-1])) for heads in shape.said_heads}
    around = {(shape.hidden // step + up) * step for step in steps for up in (0, 1)}
    for hidden in sorted(around | {least, most}):
        other = replace(shape, hidden=hidden)
        if least <= hidden <= most and other.accepted:
            yield other


def _fault(teacher: ModelShape, values: Mapping[str, int]) -> str | None:
    for axis, value in values.items():
        if not 1 <= value <= getattr(teacher, axis):
            return f"shape.{axis} is {value}, outside 1..{getattr(teacher, axis)} (the teacher's)"
        if axis in teacher.fixed and value != getattr(teacher, axis):
            return f"shape.{axis} is {value}; this model type keeps its {axis}: {teacher.fixed[axis]}"
    heads, groups, queries = values["heads"], values["groups"], teacher.heads // teacher.groups
    if heads % groups:
        return f"shape.heads is {heads}, not a multiple of shape.groups ({groups})"
    if heads // groups > queries:
        return f"shape.heads is {heads} for {groups} groups; a group has at most the teacher's {queries} query heads"
    shape = teacher.changed(values)
    if shape.whole_heads and not shape.accepted:
        return (
            f"shape.hidden is {shape.hidden}; the student's class computes the head size as hidden size / heads, so it "
            f"must be {shape.heads} heads x {shape.head_size}"
        )
    if not shape.accepted:
        near = " or ".join(map(str, sorted(shape.said_heads)))
        return f"shape.hidden is {shape.hidden}; the student's class takes only multiples of its query heads ({near})"
    return None


def _words(shape: ModelShape) -> str:
    return " ".join(f"{axis}={value}" for axis, value in shape.axes().items())
