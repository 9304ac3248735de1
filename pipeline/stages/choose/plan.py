"""plan: the blueprint of the student, from scores and shape; no model is loaded."""

from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.methods import MEASURED_DEPTH
from pipeline.model.blueprint import Blueprint, Step, compose
from pipeline.model.scores import FILE, Scores
from pipeline.model.shape import Shape, Sublayers
from pipeline.prune.merging import merge_experts
from pipeline.prune.plan import DEPTH_POLICIES, layers_that_stay, leading, plan_by
from pipeline.runtime.machine import Machine
from pipeline.stages.models import checkpoint
from pipeline.stages.stage import Inputs, Stage
from pipeline.stages.widths import WIDTH_POLICIES, PolicyInputs


def check(config: Config) -> None:
    """Refuse an amplitude that would make a layer wider, where the step is known before any work."""
    plan, kept = config.plan, config.budget.parameters or config.budget.fallback
    step = (1.0 - kept) / (config.recipe.rounds * plan.steps)
    budget = config.budget  # of which the step follows where it is of parameters
    counted = budget.total is None and budget.bytes is None and not budget.of_tokens_alone
    if plan.widths == "adaptive" and not config.shape.given and counted and plan.amplitude > step:
        raise ValueError(
            f"plan.amplitude: {plan.amplitude} is more than the step {step:.4g} that budget.parameters={kept}, "
            f"recipe.rounds={config.recipe.rounds} and plan.steps={plan.steps} leave, so a layer would grow; lower it"
        )


def settings(config: Config) -> dict[str, Any]:
    """Return the plan section without what earlier stages measured by, and the seed where a part is random."""
    unused = {"depth_tokens"}
    if config.plan.widths != "adaptive":
        unused |= {"amplitude", "steps"}
    return {
        "plan": config.plan.model_dump(exclude=unused),
        "seed": config.seed if config.plan.policy["drawn"] else None,
    }


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write blueprint.json in the indices of the teacher.

    In later rounds step.json holds the same in the indices of the student of the round before; with adaptive widths
    sparsities.json holds a sparsity for every layer that stays.
    """
    source = checkpoint(config, inputs["subject"])
    anatomy = source.anatomy
    scores, shape, policy = Scores.load(_ranked(inputs)), Shape.load(inputs["shape"]), config.plan.policy
    if config.plan.channels == "leading":
        scores = leading(scores)
    hosts = layers_that_stay(inputs, anatomy, scores.layers, policy)
    widths = list(anatomy.sizes.layers)
    chosen = WIDTH_POLICIES[config.plan.widths](PolicyInputs(config, inputs, out, anatomy, scores, hosts, shape))
    own = dict(zip(hosts, chosen, strict=True))
    if "sublayers" in inputs:
        lost = Sublayers.load(inputs["sublayers"])
        own = {host: left for host, width in own.items() if (left := lost.without(host, width)) is not None}
        hosts = list(own)
    for host, width in own.items():
        widths[host] = width
    chosen_by = policy | {"seed": config.seed, "hosts": hosts, "mixture": shape.mixture}
    step = plan_by(anatomy, scores, widths, shape.hidden, shape.layers, **chosen_by)
    if config.plan.experts == "merge":
        step = merge_experts(anatomy, scores, step, source)
    step.check(anatomy)
    blueprint = step
    if "previous_blueprint" in inputs:
        Step(step.channels, step.layers).save(out)
        blueprint = compose(Blueprint.load(inputs["previous_blueprint"]), step)
    blueprint.save(out)
    dropped = sorted(set(range(len(anatomy.sizes.layers))) - {layer.host for layer in step.layers})
    donated = sum(group.layer != layer.host for layer in step.layers for group in layer.groups)
    machine.say(f"plan: layers dropped: {dropped or 'none'}; KV groups donated across layers: {donated}")
    for part, lost_by in (("attention", lambda layer: layer.groups), ("FFN", lambda layer: layer.neurons)):
        places = [layer.host for layer in step.layers if not lost_by(layer)]
        if places:
            machine.say(f"plan: layers without {part}: {places}")


def _ranked(inputs: Inputs) -> Path:
    """Return the folder of the latest scores of heads and neurons."""
    folders = [inputs[artifact] for artifact in ("restored", "obs_orders", "scores") if artifact in inputs]
    return next(folder for folder in folders if (folder / FILE).exists())


STAGE = Stage(
    name="plan",
    makes="blueprint",
    run=run,
    settings=settings,
    needs=("subject", "teacher", "scores", "shape"),
    optional=("restored", "obs_orders", "depth", "sublayers", "sensitivities", "previous_blueprint"),
    choices={"plan.depth": (*DEPTH_POLICIES, *MEASURED_DEPTH), "plan.widths": WIDTH_POLICIES},
    check=check,
    all_ranks=False,
    revision=2,
    shows={"blueprint.json": Blueprint.FILE},
)
