"""The report as a value: everything report.json holds, gathered from the artifacts of the stages."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.model.blueprint import Blueprint
from pipeline.model.scores import Scores
from pipeline.model.sizes import Sizes
from pipeline.report.anatomy_map import fate
from pipeline.report.expert_map import kept_experts, tokens_kept

MODELS = ("teacher", "student")
Report = dict[str, Any]
Curve = Sequence[tuple[float, float]]  # (position, value)


def gather(
    evaluation: Mapping[str, Any],
    cut: Mapping[str, Any],
    recovery: Mapping[str, Any] | None,
    stages: Mapping[str, Mapping[str, Any]],
    made_with: Mapping[str, Any],
) -> Report:
    """Return the value of report.json.

    `evaluation` is evaluation.json; `recovery` is None where the student was not recovered, and then there is no state
    before recovery. `stages` (name -> seconds, peak_memory in bytes) and `made_with` (name, recipe, settings,
    versions ...) are passed on unchanged.
    """
    models = evaluation["models"]
    sizes = {
        key: {who: models[who][key] for who in MODELS}
        for key in ("parameters", "non_embedding_parameters", "checkpoint_bytes", "kv_bytes_per_token", "shape")
    }
    if all("active_parameters" in models[who] for who in MODELS):
        sizes["active_parameters"] = {who: models[who]["active_parameters"] for who in MODELS}
    left_out = () if recovery else ("start",)
    texts = {
        name: {key: value for key, value in text.items() if key not in left_out}
        for name, text in evaluation["texts"].items()
    }
    return {
        **made_with,
        **sizes,
        "perplexity": texts,
        "speed": evaluation["speed"],
        "tasks": evaluation["tasks"],
        "samples": evaluation["samples"],
        "device": evaluation["device"],
        "cut": cut,
        "recovery": recovery,
        "stages": dict(stages),
    }


def faster(search: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], float]]:
    """Return the candidates of search.json, each with its predicted speed over the teacher's, fastest first."""
    found = []
    for each in search["candidates"]:
        decode = each["decode_rate"] / search["teacher"]["decode_rate"]
        prefill = search["teacher"]["prefill_seconds"] / each["prefill_seconds"]
        found.append((each, prefill if search["serving"]["speed"] == "prefill" else decode))
    return sorted(found, key=lambda pair: -pair[1])


def widths(shape: Mapping[str, int]) -> str:
    """Return the five widths of a shape as readable text."""
    heads = f"{shape['heads']}/{shape['groups']} heads"
    return f"{shape['layers']} layers, {shape['hidden']} hidden, {heads}, {shape['neurons']} neurons"


def perplexity_of(report: Report) -> dict[str, dict[str, float]]:
    """Return the perplexities: text -> teacher, student and, if recovered, start; infinite where null."""
    return {
        name: {who: infinite(text[who]["perplexity"]) for who in ("teacher", "start", "student") if who in text}
        for name, text in report["perplexity"].items()
    }


def start_of(report: Report) -> str:
    """Return the name of the state before the last recovery."""
    return "after the last cut" if "rounds" in report else "before recovery"


def infinite(value: float | None) -> float:
    """Return a value read from JSON, where null means infinity."""
    return math.inf if value is None else value


def times(value: float, form: str = ".2f") -> str:
    """Return a perplexity or a ratio as text: in powers of ten from a million on, ∞ if not finite."""
    return format(value, form if value < 1e6 else ".1e") if math.isfinite(value) else "∞"


def cut_facts(sizes: Sizes, blueprint: Blueprint, scores: Scores) -> dict[str, Any]:
    """Return what a blueprint removes, in numbers: layers removed, and of the others those without attention or FFN; KV
    groups donated, shares kept."""
    found = fate(blueprint)
    channels = scores.channels.double()
    shares = [
        float(scores.neurons[layer][sorted(kept)].double().sum() / scores.neurons[layer].double().sum())
        for layer, kept in found.neurons.items()
        if kept and scores.neurons[layer].any()
    ]
    experts = kept_experts(blueprint, scores)
    routed = [tokens_kept(scores, experts, layer) for layer in experts if experts[layer]]
    mixture = {
        "experts": sum(len(scores.experts[layer]) for layer in experts),
        "experts_kept": sum(map(len, experts.values())),
        "expert_tokens_kept": sum(routed) / max(1, len(routed)),  # in the remaining layers
    }
    return {
        **(mixture if experts else {}),
        "layers": len(sizes.layers),
        "dropped_layers": sorted(set(range(len(sizes.layers))) - found.hosts),
        "removed_attention": [p.host for p in blueprint.layers if sizes.layers[p.host].groups and not p.groups],
        "removed_ffn": [p.host for p in blueprint.layers if sizes.layers[p.host].neurons and not p.neurons],
        "donations": [{"from": donor, "to": host, "groups": n} for (donor, host), n in found.donations.items()],
        "heads": sum(widths.heads for widths in sizes.layers),
        "heads_kept": len(found.heads),
        "neurons": sum(widths.neurons for widths in sizes.layers),
        "neurons_kept": sum(map(len, found.neurons.values())),
        "neuron_score_kept": sum(shares) / len(shares) if shares else 1.0,  # in the remaining layers
        "channels": sizes.hidden,
        "channels_kept": len(blueprint.channels),
        "channel_score_kept": float(channels[list(blueprint.channels)].sum() / channels.sum()),
        "calibration_tokens": scores.tokens,
    }


def recovery_facts(curves: Mapping[str, Curve], seen: str) -> dict[str, Any]:
    """Return the first and last value of every curve of a training, and its length in `seen` (tokens or steps)."""
    ends = {name: {"first": points[0][1], "last": points[-1][1]} for name, points in curves.items()}
    return {seen: max(points[-1][0] for points in curves.values()), "curves": ends}


def recovery_curves(rows: Sequence[Mapping[str, Any]], seen: str) -> dict[str, list[tuple[float, float]]]:
    """Return a curve for every number of metrics.jsonl, over `seen`; a row need not have every number."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != seen and isinstance(value, int | float):
                curves.setdefault(name, []).append((float(row[seen]), float(value)))
    return curves
