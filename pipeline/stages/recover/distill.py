"""distill: the student recovers by learning its teacher's distributions; interrupted, it goes on where it was."""

from pathlib import Path

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.distill.distiller import Distiller, Match, Objective
from pipeline.distill.loss import kernel_choice
from pipeline.model.blueprint import Blueprint
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.device import choose
from pipeline.runtime.machine import Machine
from pipeline.runtime.ranks import place
from pipeline.stages.stage import Inputs, Stage
from pipeline.training import Stretch, accumulation, settings_of, steps_of, train_model


def check(config: Config) -> None:
    """Refuse batches that cannot be divided, runs shorter than a step and a kernel that cannot run, before any work."""
    kernel_choice(config.distill.loss.kernel, choose(config.device.kind))
    accumulation("distill", config.distill, place()[1])
    steps, rounds = steps_of("distill", config.distill, config.data.sequence_length), config.recipe.rounds
    if rounds > steps and "distill" in config.recipe.repeat:
        raise ValueError(
            f"distill.tokens is {config.distill.tokens}, enough for {steps} steps and so for no more rounds; "
            f"recipe.rounds is {rounds}: raise the tokens or lower the rounds"
        )


def settings(config: Config) -> dict:
    """Give what determines the student; how it is spread over ranks and memory does not."""
    loss = config.distill.loss.model_dump(exclude={"chunk", "kernel"})
    read = {"after": _read(config)} if _read(config) else {}
    return settings_of(config, config.distill, {"loss"}) | {"loss": loss} | read | config.recipe.progress


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the recovered student as a model folder in float32, and metrics.jsonl, of all rounds so far."""
    asked, match = config.distill, _match(inputs)
    number, rounds = config.recipe.part
    earlier = inputs.get("previous_student")
    objective = Objective(**asked.loss.model_dump(), chunk=config.logits.chunk)
    train_model(
        "distill",
        config,
        open_checkpoint(inputs["initial_student"]),
        lambda load: Distiller(
            load(inputs["teacher"]),
            load(inputs["initial_student"]),
            objective,
            match,
            asked.gradient_checkpointing,
        ),
        Packed(inputs["tokens"] / "recovery"),
        out,
        machine,
        Stretch(number, rounds, earlier),
        _read(config),
    )


def _read(config: Config) -> int:
    """Give the sequences that the teacher was corrected on: recovery reads on after them."""
    asked = config.teacher_correction
    return (
        steps_of("teacher_correction", asked, config.data.sequence_length) * asked.global_batch_size
        if config.corrects
        else 0
    )


def _match(inputs: Inputs) -> Match | None:
    if "blueprint" not in inputs:
        return None
    blueprint = Blueprint.load(inputs["blueprint"] / "blueprint.json")
    return Match(tuple((layer, plan.host) for layer, plan in enumerate(blueprint.layers)), blueprint.channels)


STAGE = Stage(
    name="distill",
    makes="recovered",
    run=run,
    settings=settings,
    needs=("teacher", "initial_student", "tokens"),
    optional=("blueprint", "previous_student"),
    check=check,
    resumable=True,  # goes on from the checkpoints an interrupted attempt left
)
