"""A speed-up that the experts of a mixture alone keep to: fewer experts are fewer weights that a batch reads."""

from dataclasses import replace

from pipeline.costmodel.chip import Chip
from pipeline.costmodel.expert_budget import check_covered, possible_counts
from pipeline.costmodel.pareto import Serving, describe
from pipeline.costmodel.shapes import ModelShape
from pipeline.model.anatomy import Anatomy
from pipeline.model.shape import Budgeted, Reachable


def experts_for_speed(
    chip: Chip, teacher: ModelShape, anatomy: Anatomy, serving: Serving, requested: float
) -> tuple[int, Budgeted]:
    """Return the most experts per layer with at least `requested` times the teacher's predicted speed, and what they
    reach of it.

    Raise ValueError where even the fewest experts are slower; it names the reachable range.
    """
    counts = possible_counts(anatomy)
    check_covered(teacher, "budget.speedup", "set budget.total, bytes or parameters")
    whole = describe(chip, teacher, teacher, serving).seconds(serving)
    values = [whole / describe(chip, teacher, with_count(teacher, count), serving).seconds(serving) for count in counts]
    within = [place for place, value in enumerate(values) if value >= requested]
    if not within:
        raise ValueError(
            f"budget.speedup: {requested:g} cannot be reached on {chip.name}; experts alone reach {values[-1]:.4g} to "
            f"{max(values):.4g} with sequences of shape_search.batch_size={serving.batch_size}; set budget.axes=all"
        )
    places = within[-1:] + [within[-1] + 1] * (within[-1] + 1 < len(counts))
    reached, *beyond = [Reachable(values[place], {"experts": counts[place]}) for place in places]
    made = Budgeted("speedup", requested, reached.value, reached, beyond[0] if beyond else None)
    return counts[within[-1]], made


def with_count(teacher: ModelShape, count: int) -> ModelShape:
    """Return the same mixture with another number of experts per layer."""
    assert teacher.mixture is not None
    return replace(teacher, mixture=replace(teacher.mixture, experts=count))
