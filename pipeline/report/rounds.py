"""Pruning in rounds: what remains after each round, as numbers, as a figure and as a section of the page."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint
from pipeline.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, legend, panel
from pipeline.report.comparison import SPACE, count
from pipeline.report.drawing import Box, Drawing
from pipeline.report.facts import Report
from pipeline.report.layout import beside, section
from pipeline.report.tables import line, table

AXES = {"layers": "layers", "hidden": "channels", "heads": "heads", "groups": "KV groups", "neurons": "neurons"}
KL = "held_out_kl"


def round_facts(
    teacher: Anatomy, blueprints: Sequence[Blueprint], metrics: Sequence[Sequence[Mapping[str, Any]]], seen: str
) -> dict[str, Any]:
    """Return the sizes of the teacher and those after every round, in order.

    Blueprints use the indices of the teacher; `metrics` holds the rows of each round's recovery, or nothing where
    rounds have none. In the result `left` counts the weights in each layer of the teacher, and `seen` (tokens or
    steps) says where the round ended.
    """
    rounds = [_sizes(blueprint.student(teacher), [plan.host for plan in blueprint.layers]) for blueprint in blueprints]
    for each, rows in zip(rounds, metrics):
        held = [row[KL] for row in rows if KL in row]
        each |= {seen: max(row[seen] for row in rows)} | ({KL: [held[0], held[-1]]} if held else {})
    whole = _sizes(teacher, range(len(teacher.sizes.layers)))
    places = range(len(teacher.sizes.layers))
    for each in (whole, *rounds):
        each["left"] = [each["left"].get(layer, 0) for layer in places]
    return {"teacher": whole, "rounds": rounds}


def _sizes(anatomy: Anatomy, hosts: Sequence[int]) -> dict[str, Any]:
    parameters, inner = anatomy.parameters()
    layers = anatomy.sizes.layers
    tensors = anatomy.layer_tensors.values()
    left = {host: sum(math.prod(anatomy.shape(each, place)) for each in tensors) for place, host in enumerate(hosts)}
    widths = {axis: sorted({getattr(layer, axis) for layer in layers}) for axis in ("heads", "groups", "neurons")}
    ends = {axis: [values[0], values[-1]] for axis, values in widths.items()}
    sizes = {"layers": [len(layers)] * 2, "hidden": [anatomy.sizes.hidden] * 2}
    return {"parameters": parameters, "non_embedding_parameters": inner, **sizes, **ends, "left": left}


def cuts(facts: Mapping[str, Any], seen: str) -> list[tuple[float, str]]:
    """Return the position in the recovery at which each later round begins, and its name."""
    rounds = facts["rounds"]
    return [(float(before[seen]), f"round {i}") for i, before in enumerate(rounds[:-1], 2) if seen in before]


def layers_by_round(facts: Mapping[str, Any]) -> Drawing:
    """Draw one column per layer of the teacher: the weights that remain, and above them what each round removed."""
    whole, rounds = facts["teacher"]["left"], facts["rounds"]
    x = Scale(-0.6, len(whole) - 0.4, LEFT, WIDTH - RIGHT)
    y = Scale(0.0, 100.0, HEIGHT - BOTTOM, TOP + 2)
    marks = panel("Weights of each layer, % of the teacher’s", x, y, "layer", x_ticks=6)
    wide = 0.8 * (x(1) - x(0))
    tints = [0.16 + 0.42 * i / max(len(rounds) - 1, 1) for i in range(len(rounds))]
    for layer, full in enumerate(whole):
        levels = [100.0, *(100.0 * each["left"][layer] / full for each in rounds)]
        left = x(layer) - wide / 2
        marks.append(Box(left, y(100.0), wide, y(0.0) - y(100.0), "paper"))  # tints lie on no grid
        for number, (before, after) in enumerate(zip(levels, levels[1:]), 1):
            if before > after:
                tip = f"layer {layer}, round {number}: {before:.0f} % → {after:.0f} %"
                marks.append(Box(left, y(before), wide, y(after) - y(before), "kept", tip, tints[number - 1]))
        if levels[-1]:
            tip = f"layer {layer}: {levels[-1]:.0f} % remains"
            marks.append(Box(left, y(levels[-1]), wide, y(0.0) - y(levels[-1]), "kept", tip))
    keys = [("remains", partial(_key, 1.0))]
    for name, tint in (("removed last", tints[-1]), ("removed first", tints[0])):
        keys.append((name, partial(_key, tint)))
    marks += legend(keys, LEFT, 26)
    ends = ", ".join(f"{100 * now / full:.0f} %" for now, full in zip(rounds[-1]["left"], whole))
    alt = f"Weights of each of {len(whole)} layers after {len(rounds)} rounds: {ends} of the teacher's."
    return Drawing(WIDTH, HEIGHT, alt, tuple(marks))


def rounds_section(report: Report, drawings: Mapping[str, Drawing]) -> str:
    """Return the section on the rounds, empty where there was one."""
    if "rounds" not in report:
        return ""
    facts = report["rounds"]
    recovered = "tokens" in facts["rounds"][0]
    done = ("scored", "pruned by one part", *(("recovered",) if recovered else ()))
    caption = (
        f"In each of {len(facts['rounds'])} rounds the model was {', '.join(done[:-1])} and {done[-1]}. One column per "
        "layer of the teacher: below, the weights that remain; above, those that each round removed."
    )
    note = "Widths are per layer, as a range where layers differ."
    if recovered:
        note += (
            " Tokens are counted from the start of recovery; held-out KL to the teacher in nats per token, at the "
            "start and the end of the round."
        )
    return section("Rounds", beside(drawings["rounds"], caption), _rounds_table(facts, recovered, note))


def _rounds_table(facts: Mapping[str, Any], recovered: bool, caption: str) -> str:
    whole, rounds = facts["teacher"], facts["rounds"]
    changed = [axis for axis in AXES if any(each[axis] != whole[axis] for each in rounds)]
    columns = ["parameters", *(AXES[axis] for axis in changed)]
    columns += ["tokens", "held-out KL"] if recovered else []
    body = []
    for label, each in (("teacher", whole), *((f"round{SPACE}{i}", each) for i, each in enumerate(rounds, 1))):
        cells = [count(each["parameters"]), *(_ends(each[axis]) for axis in changed)]
        if recovered:
            cells += [count(each["tokens"]) if "tokens" in each else "", _change(each.get(KL))]
        body.append(line(label, cells, columns))
    return table(columns, body, caption)


def _key(opacity: float, x: float, y: float) -> Box:
    return Box(x, y - 5, 9, 9, "kept", opacity=opacity)


def _ends(pair: Sequence[int]) -> str:
    low, high = pair
    return str(low) if low == high else f"{low}–{high}"


def _change(pair: Sequence[float] | None) -> str:
    return f"{pair[0]:.3g}{SPACE}→{SPACE}{pair[1]:.3g}" if pair else ""
