"""The map of experts: every expert of every layer of the teacher, its share of the routed tokens, and what stayed."""

from collections.abc import Callable

from pipeline.model.blueprint import Blueprint
from pipeline.model.scores import TOKENS, Scores
from pipeline.report.axes import legend
from pipeline.report.drawing import Box, Drawing, Mark, Text

LABEL, SHARE, WIDTH, TOP, ROW = 34.0, 90.0, 736.0, 46.0, 15.0  # pixels; WIDTH: of the page's text


def kept_experts(blueprint: Blueprint, scores: Scores) -> dict[int, frozenset[int]]:
    """Return the experts that stay, by layer of the teacher; none of a layer that was removed."""
    hosts = {plan.host: plan.experts for plan in blueprint.layers}
    return {
        layer: frozenset(hosts[layer] or range(len(values))) if layer in hosts else frozenset()
        for layer, values in enumerate(scores.experts)
        if len(values)
    }


def tokens_kept(scores: Scores, kept: dict[int, frozenset[int]], layer: int) -> float:
    """Return the share of a layer's routed tokens that went to the experts that stay."""
    tokens = scores.routing[layer][TOKENS]
    return float(tokens[sorted(kept[layer])].sum() / tokens.sum())


def expert_map(blueprint: Blueprint, scores: Scores) -> Drawing:
    """Draw one row a layer that has experts: each expert in order, darker where more tokens were routed to it."""
    kept = kept_experts(blueprint, scores)
    most = max(len(scores.experts[layer]) for layer in kept)
    cell = min(15.0, (WIDTH - LABEL - SHARE) / most)
    right = LABEL + most * cell
    marks: list[Mark] = [
        Text(0, TOP - 10, "layer", size=10.5),
        Text(LABEL, TOP - 10, "experts, by index", size=10.5),
        Text(right + SHARE, TOP - 10, "tokens kept", size=10.5, anchor="end"),
    ]
    for row, layer in enumerate(kept):
        y = TOP + row * ROW
        marks.append(Text(LABEL - 14, y + ROW * 0.75, str(layer), "ink" if kept[layer] else "muted", 10.5, "end"))
        tokens, values = scores.routing[layer][TOKENS], scores.experts[layer]
        for expert in range(len(values)):
            share, stays = float(tokens[expert] / tokens.sum()), expert in kept[layer]
            score = float(values[expert] / values.mean()) if values.any() else 0.0
            fate = "kept" if stays else "removed"
            tip = f"layer {layer}, expert {expert}: {share:.1%} of the tokens, {score:.2f} of the mean score, {fate}"
            shade = 0.25 + 0.75 * float(tokens[expert] / tokens.max()) if stays else 1.0
            marks.append(Box(LABEL + expert * cell, y + 1, max(cell - 2, 1.0), ROW - 2, fate, tip, shade))
        label = f"{tokens_kept(scores, kept, layer):.0%}"
        marks.append(Text(right + SHARE, y + ROW * 0.75, label, size=10.5, anchor="end"))
    keys: list[tuple[str, Callable[[float, float], Mark]]] = [
        ("kept", lambda x, y: Box(x, y - 5, 9, 9, "kept")),
        ("removed", lambda x, y: Box(x, y - 5, 9, 9, "removed")),
    ]
    marks += legend(keys, 0, 8)
    total, stayed = sum(len(scores.experts[layer]) for layer in kept), sum(map(len, kept.values()))
    alt = f"Map of experts: {stayed} of {total} experts of {len(kept)} layers are kept."
    return Drawing(right + SHARE, TOP + len(kept) * ROW + 6, alt, tuple(marks))
