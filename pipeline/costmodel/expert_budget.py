"""Budgets that the experts of a mixture alone keep to: the most that stay in each layer, counted exactly."""

from dataclasses import replace

from pipeline.costmodel.shapes import ModelShape
from pipeline.costmodel.size_budget import Unit
from pipeline.model.anatomy import Anatomy
from pipeline.model.shape import Budgeted, Reachable


def with_experts(anatomy: Anatomy, count: int, neurons: int | None = None, shared: int | None = None) -> Anatomy:
    """Return the anatomy of a student with another number of experts per layer, of neurons of each, and of those of
    shared experts."""
    changed = {"e": count} | ({"x": neurons} if neurons else {}) | ({"y": shared} if shared else {})
    carried = dict(anatomy.sizes.carried) | changed
    return anatomy.narrowed(replace(anatomy.sizes, carried=carried), anatomy.layer_types)


def possible_counts(anatomy: Anatomy) -> list[int]:
    """Return the numbers of experts that a student can have, ascending. Raise ValueError for a model without any."""
    if anatomy.routing is None:
        raise ValueError(
            f"budget.axes: experts, but model_type {anatomy.family.model_type!r} has no experts; choose all, layers or "
            "neurons"
        )
    most = anatomy.sizes.carried["e"]
    return [count for count in range(1, most + 1) if anatomy.routing.fault(count, most) is None]


def experts_for(anatomy: Anatomy, budget: str, requested: float, unit: Unit, source: Anatomy) -> tuple[int, Budgeted]:
    """Return the most experts per layer within a budget, and what they reach of it.

    Args:
        anatomy: the tensors that a student of the source's shape has.
        budget: `parameters` (a fraction of those outside the embeddings), `total` (of all) or `bytes` (in `unit`).

    Raises:
        ValueError: where even the fewest experts are more; it names the reachable range.
    """
    embeddings = int(budget != "parameters")
    cache = sum(layer.groups for layer in anatomy.sizes.layers) * unit.cached
    whole = 1.0 if budget == "bytes" else source.parameters()[1 - embeddings]
    counts = possible_counts(anatomy)
    sizes = [
        (with_experts(anatomy, count).parameters()[1 - embeddings] * unit.bytes + cache) / whole for count in counts
    ]
    within = [place for place, size in enumerate(sizes) if size <= requested]
    if not within:
        raise ValueError(
            f"budget.{budget}: {requested:g} cannot be reached; experts alone reach {sizes[0]:.4g} to {sizes[-1]:.4g}"
        )
    places = within[-1:] + [within[-1] + 1] * (within[-1] + 1 < len(counts))
    reached, *beyond = [Reachable(sizes[place], {"experts": counts[place]}) for place in places]
    made = Budgeted(budget, requested, reached.value, reached, beyond[0] if beyond else None)
    return counts[within[-1]], made


def check_covered(teacher: ModelShape, setting: str, remedy: str) -> None:
    """Raise ValueError where a model has attention that the formulas of shapes do not count."""
    if teacher.uncounted:
        raise ValueError(
            f"{setting}: the chip model counts attention with query heads and KV groups, and in this model "
            f"{teacher.uncounted}; {remedy}"
        )
