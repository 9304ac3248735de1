"""recipe=auto: the recipe that measured best for what a configuration requests, and why.

The figures behind each rule are in docs/results.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"  # the file of conf/recipe/ that leaves the choice to recipe_for
LONG = 1e9  # recovery tokens from which the published recipe is chosen; none was measured here with as many
LEAST = 0.5  # of the parameters without embeddings, or of all: the least that recipes were measured with
SERVED = ("speedup", "memory_gb", "decode_rate", "prefill_seconds", "context")  # of budget.*: not of size alone


@dataclass(frozen=True)
class Choice:
    """A recipe, why it was chosen, and settings beside it, which typed ones override."""

    recipe: str
    reason: str
    settings: Mapping[str, str] = field(default_factory=dict)


def recipe_for(values: Mapping[str, Any]) -> Choice:
    """Return the recipe for a composed configuration, which need not be valid: the first rule that applies decides."""
    found = (rule(values) for rule in (_cut_elsewhere, _experts, _long_recovery, _all_axes, _unrecovered, _deep))
    return next(filter(None, found), None) or Choice(
        "best",
        "of the recipes measured at this size it loses least: narrower FFNs, restored and distilled locally",
    )


def _cut_elsewhere(values: Mapping[str, Any]) -> Choice | None:
    start = values["model"]["start"]
    return Choice("recover", f"model.start={start} is a student that is cut already") if start else None


def _experts(values: Mapping[str, Any]) -> Choice | None:
    """Experts are no neurons of an FFN, which is what best removes in its order."""
    shape, budget = values["shape"], values["budget"]
    requests = [f"shape.{name}" for name in ("experts", "expert_neurons", "shared_neurons") if shape[name] is not None]
    requests += ["budget.active_parameters"] if budget["active_parameters"] is not None else []
    requests += ["budget.axes=experts"] if budget["axes"] == "experts" else []
    return Choice("pangu_light", f"{requests[0]} concerns experts, which best does not support") if requests else None


def _long_recovery(values: Mapping[str, Any]) -> Choice | None:
    tokens = values["distill"]["tokens"]
    if not _reaches(tokens, lambda number: number >= LONG):
        return None
    return Choice(
        "pangu_light",
        f"distill.tokens={tokens:g} is a long recovery, for which it is published; none is measured here with as many",
    )


def _all_axes(values: Mapping[str, Any]) -> Choice | None:
    """Speed, memory, widths and searches concern all axes, and FFNs alone reach little of them."""
    requests = [f"budget.{name}" for name in SERVED if values["budget"][name] is not None]
    requests += [f"shape.{axis}" for axis, width in values["shape"].items() if width is not None]
    requests += ["recipe.shape=search"] if values["recipe"]["shape"] == "search" else []
    if not requests:
        return None
    reason = f"{requests[0]} concerns more than FFNs; on all axes best starts nearer to the teacher than pangu_light"
    return Choice("best", reason, {"budget.axes": "all"})


def _unrecovered(values: Mapping[str, Any]) -> Choice | None:
    stages = values["stages"]
    if stages is None or "distill" in stages:
        return None
    return Choice("best", "without recovery best measured nearest to the teacher, before tyr and flap")


def _deep(values: Mapping[str, Any]) -> Choice | None:
    budget = values["budget"]
    if budget["bytes"] is not None:
        reason = "budget.bytes may need more than FFNs can lose; best measured nearest to the teacher"
        return Choice("best", reason, {"budget.axes": "all"})
    name = "total" if budget["total"] is not None else "parameters"
    if not _reaches(budget[name], lambda kept: kept < LEAST):
        return None
    reason = f"budget.{name}={budget[name]:g} is more than FFNs can lose and deeper than any recipe was measured"
    return Choice("best", reason, {"budget.axes": "all"})


def _reaches(value: Any, condition: Callable[[float], bool]) -> bool:
    """Return whether a value, not validated yet, is a number of which a condition holds."""
    return isinstance(value, int | float) and condition(value)
