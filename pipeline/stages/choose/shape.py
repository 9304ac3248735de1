"""shape: the student's five widths, as given or as a budget determines them without a measurement."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.allocate.budgets import layer_weights
from pipeline.config import Config
from pipeline.costmodel.pareto import check_alike
from pipeline.costmodel.shapes import ModelShape
from pipeline.costmodel.size_budget import check_cache
from pipeline.model.anatomy import Anatomy
from pipeline.model.shape import Shape, check_depth
from pipeline.model.sizes import LayerSizes
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import model_folder
from pipeline.stages.models import checkpoint
from pipeline.stages.stage import Inputs, Stage
from pipeline.stages.student_shape import BUDGET_AXES, kept_shares, student_of, unties
from pipeline.stages.whole_layers import check_whole

EXACT = 1e-9  # what rounding may add to a step


def check(config: Config) -> None:
    """Refuse a shape that is both given and limited by a budget, and budgets that the policies do not support.

    Where the teacher is a folder, also refuse a shape that cannot be cut from it, and a model whose speed the chip
    model cannot predict.
    """
    budget, widths = config.budget, config.plan.widths
    limited = [*budget.predicted, *budget.sized]
    if config.recipe.shape == "given" and config.shape.given and limited:
        raise ValueError(f"shape: the shape is given and budget.* limits it by {limited}; set only one of them")
    requested = [*budget.sized, *(["speedup"] if budget.speedup else [])]
    if config.recipe.shape == "given" and len(requested) > 1:
        raise ValueError(f"budget: {' and '.join(requested)} are given, and each determines the shape; keep one")
    if budget.context and not budget.bytes:
        raise ValueError("budget.context: counts a KV cache into budget.bytes, which is null; set budget.bytes too")
    if budget.context and widths != "uniform":
        raise ValueError(
            f"budget.context: plan.widths={widths} gives layers different KV groups, so the cache is not known; set "
            "plan.widths=uniform, or leave budget.context out"
        )
    served = {"speedup"} if budget.axes == "experts" else set()
    if budget.axes != "all" and set(budget.predicted) - served:
        raise ValueError(
            f"budget.axes: {budget.axes} supports budget.{', '.join(['parameters', 'total', 'bytes', *served])} only; "
            f"remove {sorted(set(budget.predicted) - served)}, or set budget.axes=all"
        )
    uncounted = budget.axes in ("experts", "sublayers")
    if budget.active_parameters and (uncounted or widths != "uniform"):
        chosen = f"budget.axes={budget.axes}" if uncounted else f"plan.widths={widths}"
        raise ValueError(
            f"budget.active_parameters: {chosen} does not determine what a token uses; set plan.widths=uniform and "
            "budget.axes=all, layers or neurons"
        )
    alike = budget.axes in ("layers", "experts", "sublayers") or (budget.axes == "neurons" and widths != "measured")
    if alike and widths != "uniform":
        raise ValueError(
            f"budget.axes: {budget.axes} makes all layers alike, and plan.widths={widths} does not; set budget.axes=all"
        )
    if widths != "uniform" and budget.predicted:
        raise ValueError(
            f"plan.widths: {widths} gives layers different widths, and {list(budget.predicted)} of budget.* are only "
            "predicted for equal ones; set budget.parameters, total or bytes"
        )
    folder = model_folder(config.model.path, config.model.allow_pickle)
    if folder is None:
        return
    anatomy = open_checkpoint(folder, config.model.allow_pickle).anatomy
    check_whole(config, anatomy)
    if config.budget.context:
        check_cache(anatomy)
    if config.recipe.shape == "search" or budget.predicted:
        check_alike(ModelShape.of(anatomy))
    elif enabled(config) and (config.stages is None or "shape" in config.stages):
        if widths != "uniform":
            _check_free(anatomy, widths)
        student = student_of(config, anatomy).shape
        if "plan" in config.recipe.stages:
            check_depth(student.layers, len(anatomy.sizes.layers), anatomy.protected_layers(config.plan.keep_first))
            if widths == "adaptive":
                _check_amplitude(config, anatomy)


def _check_free(anatomy: Anatomy, widths: str) -> None:
    """Refuse a policy that gives layers heads and neurons of their own, where the model keeps either."""
    for axis in ("heads", "groups", "neurons"):
        if axis in anatomy.family.fixed:
            raise ValueError(
                f"plan.widths={widths} chooses the {axis} of each layer, and model_type {anatomy.family.model_type!r} "
                f"keeps its {axis}: {anatomy.family.fixed[axis]}; set plan.widths=uniform"
            )


def _check_amplitude(config: Config, anatomy: Anatomy) -> None:
    """Refuse an amplitude that is larger than the step of a round; the teacher's layers count as alike.

    Steps after a round that removes layers are not known: which layers those are decides how sparse the others are.
    """
    sizes, plan, before, layers = anatomy.sizes, config.plan, 0.0, None
    for number in range(1, config.recipe.rounds + 1):
        student = student_of(config.at_round(number), anatomy)
        shape = student.shape
        if layers not in (None, shape.layers):
            return
        left = replace(sizes, hidden=shape.hidden, layers=sizes.layers[: shape.layers])
        even = [LayerSizes(shape.heads, shape.groups, shape.neurons)] * shape.layers
        weights = layer_weights(left, even) if student.weights is None else student.weights
        sparsity = 1.0 - weights / layer_weights(left, left.layers)
        step = (sparsity - before) / plan.steps
        if plan.amplitude > step + EXACT:
            raise ValueError(
                f"plan.amplitude: {plan.amplitude} is more than the step {step:.4g} of round {number} of"
                f" {config.recipe.rounds}, so a layer would grow; lower it"
            )
        before, layers = sparsity, shape.layers


def enabled(config: Config) -> bool:
    """Return whether the shape is not searched, and the student not cut elsewhere."""
    return config.recipe.shape == "given" and config.model.start is None


def settings(config: Config) -> dict[str, Any]:
    """Return the shape and budget sections and what else decides which shapes are possible.

    Where limits are predicted, also the chip and how the student is served.
    """
    result = {
        "shape": config.shape.model_dump(),
        "budget": config.budget.model_dump(include={"parameters", "axes", "fallback"}),
        "own_widths": config.plan.widths != "uniform",
        "keep_first": config.plan.keep_first,
        "bias_compensation": config.reinit.bias_compensation,
        "progress": config.recipe.progress,
    }
    counted = {name: value for name, value in config.budget.sized.items() if name != "parameters"}
    if counted:
        result["size"] = counted | {
            "context": config.budget.context,
            "dtype": config.export.dtype if config.budget.bytes else None,
            "untied": unties(config),
        }
    if config.budget.of_tokens_alone:
        result["tokens_alone"] = True
    if config.budget.predicted:
        result["limits"] = config.budget.limits
        result["serving"] = config.shape_search.serving
        result["chip"] = config.device.chip_facts
    return result


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write shape.json: the student's shape after this round; and budget.json where a budget determined it.

    Raise ValueError, naming the nearest possible shapes, for one that cannot be cut, and naming the reachable range,
    for a budget that no shape keeps to.
    """
    anatomy = checkpoint(config, inputs["teacher"]).anatomy
    teacher = ModelShape.of(anatomy)
    student = student_of(config, anatomy)
    made = Shape(**student.shape.axes(), weights=student.weights)
    mixture = {name: getattr(student, name) for name in made.mixture}
    replace(made, **mixture).save(out)
    kept, used = kept_shares(anatomy, student)
    if teacher.mixture is not None:
        most = teacher.mixture.experts
        words = f"{student.shape.axes()}, {student.experts or most} of {most} experts per layer"
        machine.say(
            f"shape: {words}, keeps {kept:.1%} of the parameters outside the embeddings, and {used:.1%} of those that "
            "a token uses"
        )
    else:
        machine.say(f"shape: {student.shape.axes()} keeps {kept:.1%} of the parameters outside the embeddings")
    if student.budget is not None:
        student.budget.save(out)
        machine.say(student.budget.sentence())


STAGE = Stage(
    name="shape",
    makes="shape",
    run=run,
    settings=settings,
    needs=("teacher", "subject"),
    enabled=enabled,
    choices={"budget.axes": BUDGET_AXES},
    check=check,
    all_ranks=False,
    shows={"shape.json": Shape.FILE},
)
