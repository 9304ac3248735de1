"""distill: the student recovers by learning its teacher's distributions; interrupted, it goes on where it was."""

from pathlib import Path

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.distill.distiller import Distiller, Match, Objective
from pipeline.distill.loss import kernel_choice
from pipeline.model.blueprint import Blueprint
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.device import choose
from pipeline.runtime.ranks import place
from pipeline.training import Stretch, accumulation, settings_of, steps_of, train_model

MAKES = "student"
NEEDS = ("teacher", "start", "tokens")
# The blueprint says which teacher states the hidden-state terms compare with; in later rounds `original` teaches, and
# `teacher` is the student of the round before.
OPTIONAL = ("blueprint", "original")
EVERY_RANK = True
RESUMES = True  # goes on from the checkpoints an interrupted attempt left


def check(config: Config) -> None:
    """Refuse batches that cannot be divided, runs shorter than a step and a kernel that cannot run, before any work."""
    kernel_choice(config.distill.loss.kernel, choose(config.device.kind))
    accumulation("distill", config.distill, place()[1])
    steps, rounds = steps_of("distill", config.distill, config.data.sequence), config.recipe.rounds
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


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write the recovered student as a model folder in float32, and metrics.jsonl, of all rounds so far."""
    asked, match = config.distill, _match(inputs)
    number, rounds = config.recipe.part
    earlier = inputs["teacher"] if "original" in inputs else None
    objective = Objective(**asked.loss.model_dump())
    train_model(
        "distill",
        config,
        open_checkpoint(inputs["start"]),
        lambda load: Distiller(
            load(inputs.get("original", inputs["teacher"])),
            load(inputs["start"]),
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
    asked = config.correct
    return steps_of("correct", asked, config.data.sequence) * asked.batch if config.corrects else 0


def _match(inputs: dict[str, Path]) -> Match | None:
    if "blueprint" not in inputs:
        return None
    blueprint = Blueprint.load(inputs["blueprint"] / "blueprint.json")
    return Match(tuple((layer, plan.host) for layer, plan in enumerate(blueprint.layers)), blueprint.channels)
