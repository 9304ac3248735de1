"""Stage distill: train the student on its teacher's distributions; an interrupted training resumes."""

from functools import partial
from pathlib import Path

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.distill.chunk import method_of
from pipeline.distill.distiller import Distiller, Match, Objective
from pipeline.distill.selection import Selection
from pipeline.model.blueprint import Blueprint
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.device import choose
from pipeline.runtime.machine import Machine
from pipeline.runtime.ranks import place
from pipeline.stages.stage import Inputs, Stage
from pipeline.training import Stretch, train_model
from pipeline.training_settings import accumulation, check_text, sequences_of, settings_of, steps_of


def check(config: Config) -> None:
    """Refuse an unknown divergence, a kernel that cannot run, batches that do not divide and runs below a step."""
    loss = config.distill.loss
    method_of(loss.kind, loss.kernel, choose(config.device.kind))
    accumulation("distill", config.distill, place()[1])
    steps, rounds = steps_of("distill", config.distill, config.data.sequence_length), config.recipe.rounds
    if rounds > steps and "distill" in config.recipe.repeat:
        raise ValueError(
            f"distill.tokens: {config.distill.tokens} is enough for {steps} steps, fewer than recipe.rounds "
            f"({rounds}); raise the tokens or lower the rounds"
        )


def settings(config: Config) -> dict:
    """Return what determines the student; how it is spread over ranks and memory does not."""
    loss = config.distill.loss.model_dump(exclude={"kernel"})
    skipped = {"after": _skipped(config)} if _skipped(config) else {}
    return settings_of(config, config.distill, {"loss"}) | {"loss": loss} | skipped | config.recipe.progress


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the recovered student as a model folder in float32, recovery.json, and metrics.jsonl of all rounds."""
    number, rounds = config.recipe.part
    match = _match(inputs)
    objective = Objective(**config.distill.loss.model_dump(), chunk=config.logits.chunk)
    text = Packed(inputs["tokens"] / "recovery")
    read = sequences_of("distill", config) + _skipped(config)
    if number == 1 and read > len(text):
        machine.say(f"distill: the recovery text has {len(text)} sequences and is read {read / len(text):.1f} times")
    train_model(
        "distill",
        config,
        open_checkpoint(inputs["initial_student"]),
        lambda load: Distiller(
            load(inputs["teacher"]),
            load(inputs["initial_student"]),
            objective,
            match,
            config.distill.gradient_checkpointing,
            text.marked,
        ),
        text,
        out,
        machine,
        Stretch(number, rounds, inputs.get("previous_student")),
        _skipped(config),
        Selection("held_out_kl", config.distill.select == "best", config.distill.patience),
        marked=True,
    )


def _skipped(config: Config) -> int:
    """Return the number of sequences that teacher correction read: recovery continues after them."""
    return sequences_of("teacher_correction", config) if config.corrects else 0


def _match(inputs: Inputs) -> Match | None:
    if "blueprint" not in inputs:
        return None
    blueprint = Blueprint.load(inputs["blueprint"])
    return Match(tuple((layer, plan.host) for layer, plan in enumerate(blueprint.layers)), blueprint.channels)


STAGE = Stage(
    name="distill",
    makes="recovered",
    run=run,
    settings=settings,
    needs=("teacher", "initial_student", "tokens"),
    optional=("blueprint", "previous_student"),
    check=check,
    check_text=partial(check_text, "distill"),
    resumable=True,
)
