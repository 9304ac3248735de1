"""plan: the blueprint of the student, from scores and shape; pure, fast, no model needed."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.allocate.budgets import layer_weights
from pipeline.allocate.curves import curves_of, measured_widths
from pipeline.allocate.widths import adaptive_widths, widths_above
from pipeline.config import Config
from pipeline.costmodel.shapes import ModelShape, multiples_for
from pipeline.model.anatomy import Anatomy, LayerSizes
from pipeline.model.blueprint import Blueprint, compose
from pipeline.model.scores import Scores
from pipeline.prune.importance.score import standardised
from pipeline.prune.plan import layers_that_stay, leading, plan_by
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.machine import Machine
from pipeline.stages.stage import Inputs, Stage

SPARSITIES = "sparsities.json"


def check(config: Config) -> None:
    """Refuse an amplitude that would let a layer grow, where the step is known before any work."""
    asked, kept = config.plan, config.budget.parameters or config.budget.fallback
    step = (1.0 - kept) / (config.recipe.rounds * asked.steps)
    if asked.widths == "adaptive" and not config.shape.given and asked.amplitude > step:
        raise ValueError(
            f"plan.amplitude is {asked.amplitude}, more than the step {step:.4g} that budget.parameters={kept}, "
            f"recipe.rounds={config.recipe.rounds} and plan.steps={asked.steps} leave, so a layer would grow; lower it"
        )


def settings(config: Config) -> dict:
    """Give the plan section without what was measured before, and the seed where a part is drawn at random."""
    unused = set() if config.plan.widths == "adaptive" else {"amplitude", "steps"}
    asked = config.plan.model_dump(exclude={"depth_tokens"} | unused)
    return asked | ({"seed": config.seed} if config.plan.policy["drawn"] else {})


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write blueprint.json in the indices of the model the line began with; in later rounds step.json, which says the
    same of the student of the round before; with adaptive widths sparsities.json, one a layer that stays."""
    anatomy = open_checkpoint(inputs["subject"], config.model.allow_pickle).anatomy
    scores = Scores.load(_found(inputs, "scores.safetensors"))
    shape = json.loads((inputs["shape"] / "shape.json").read_text())
    if config.plan.channels == "leading":
        scores = leading(scores)
    policy, hidden, count = config.plan.policy, shape["hidden"], shape["layers"]
    hosts = layers_that_stay(inputs, scores.layers, policy)
    widths = list(anatomy.sizes.layers)
    for host, width in zip(hosts, _widths(config, inputs, anatomy, scores, hosts, shape, out), strict=True):
        widths[host] = width
    blueprint = plan_by(anatomy, scores, widths, hidden, count, **policy, seed=config.seed, hosts=hosts)
    blueprint.check(anatomy)
    if "previous_blueprint" in inputs:
        blueprint.save(out / "step.json")
    whole = compose(_before(inputs), blueprint) if "previous_blueprint" in inputs else blueprint
    whole.save(out / "blueprint.json")
    dropped = sorted(set(range(len(anatomy.sizes.layers))) - {place.host for place in blueprint.layers})
    donated = sum(group.layer != place.host for place in blueprint.layers for group in place.groups)
    machine.say(f"plan: layers dropped {dropped or 'none'}, KV groups donated across layers {donated}")


def _found(inputs: Inputs, file: str) -> Path:
    """Give the file of the latest stage that says which heads and neurons stay."""
    folders = [inputs[artifact] for artifact in ("restored", "obs_orders", "scores") if artifact in inputs]
    return next(folder / file for folder in folders if (folder / file).exists())


def _widths(
    config: Config,
    inputs: Inputs,
    anatomy: Anatomy,
    scores: Scores,
    hosts: Sequence[int],
    shape: dict[str, int],
    out: Path,
) -> list[LayerSizes]:
    """Give the widths of the layers that stay: those that restored weights were made for, or those of the policy."""
    made = inputs["restored"] / "widths.json" if "restored" in inputs else None
    if made and made.exists():
        widths = [LayerSizes(**each) for each in json.loads(made.read_text())]
        return [widths[host] for host in hosts]
    widest = LayerSizes(shape["heads"], shape["groups"], shape["neurons"])
    even = [widest.within(anatomy.sizes.layers[host]) for host in hosts]
    if config.plan.widths == "uniform":
        return even
    origin = _original(config, inputs)
    multiple = multiples_for(ModelShape.of(origin)).neurons
    own = replace(anatomy.sizes, hidden=shape["hidden"], layers=tuple(anatomy.sizes.layers[host] for host in hosts))
    weights = shape.get("weights") or layer_weights(own, even)
    if config.plan.widths == "threshold":
        return widths_above(own, *standardised(scores, hosts), weights, multiple)
    if config.plan.widths == "measured":
        rows = json.loads((inputs["sensitivities"] / "sensitivities.json").read_text())
        curves = [curves_of(rows, host) for host in hosts]
        return measured_widths(own, *zip(*curves, strict=True), weights, multiple)
    places, sparsities = range(len(anatomy.sizes.layers)), [0.0] * len(anatomy.sizes.layers)
    if "previous_blueprint" in inputs:
        places = [plan.host for plan in _before(inputs).layers]
        sparsities = json.loads((inputs["previous_blueprint"] / SPARSITIES).read_text())
    widths, sparsities = adaptive_widths(
        replace(own, layers=tuple(origin.sizes.layers[places[host]] for host in hosts)),
        own.layers,
        torch.tensor([sparsities[host] for host in hosts], dtype=torch.float64),
        scores.layers[list(hosts)],
        weights,
        amplitude=config.plan.amplitude,
        steps=config.plan.steps,
        multiple=multiple,
    )
    (out / SPARSITIES).write_text(json.dumps(sparsities.tolist()))
    return widths


def _original(config: Config, inputs: Inputs) -> Anatomy:
    return open_checkpoint(inputs["teacher"], config.model.allow_pickle).anatomy


def _before(inputs: Inputs) -> Blueprint:
    """Give what earlier rounds left, in the indices of the model the line began with."""
    return Blueprint.load(inputs["previous_blueprint"] / "blueprint.json")


STAGE = Stage(
    name="plan",
    makes="blueprint",
    run=run,
    settings=settings,
    needs=("subject", "teacher", "scores", "shape"),
    optional=("restored", "obs_orders", "depth", "sensitivities", "previous_blueprint"),
    check=check,
    all_ranks=False,
    shows={"blueprint.json": "blueprint.json"},
)
