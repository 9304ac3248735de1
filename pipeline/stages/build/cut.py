"""cut: the student's checkpoint, streamed out of the teacher's as the blueprint says, and re-initialised."""

import shutil
from pathlib import Path

from pipeline.config import Config
from pipeline.model.blueprint import Blueprint
from pipeline.model.hf_config import student_config
from pipeline.prune.surgery.bias import biased_anatomy, biased_config, compensate_biases
from pipeline.prune.surgery.initial_student import begun
from pipeline.runtime.checkpoint import open_checkpoint, open_tensors, write_checkpoint
from pipeline.runtime.disk import need_space
from pipeline.runtime.machine import Machine
from pipeline.stages.stage import Inputs, Stage


def enabled(config: Config) -> bool:
    """Whether the student was not cut elsewhere."""
    return config.model.start is None


def settings(config: Config) -> dict:
    """Give what changes the cut weights: stabilised gains, gain compensation and restored outputs."""
    restored = {"damping": config.restore.damping} if config.restore.outputs else {}
    biased = {"bias_compensation": True} if config.reinit.bias_compensation else {}
    return {"slnp": config.reinit.slnp, "gain_compensation": config.reinit.gain_compensation} | restored | biased


def needs_also(config: Config) -> tuple[str, ...]:
    """Give the scores, beside which the means stand that biases compensate with."""
    return ("scores",) if config.reinit.bias_compensation else ()


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the student before recovery as a model folder, one shard in memory at a time."""
    source = open_checkpoint(inputs["subject"], config.model.allow_pickle)
    need_space(out, source.bytes())
    shutil.rmtree(out, ignore_errors=True)
    anatomy, kind = source.anatomy, source.config
    step = inputs["blueprint"] / "step.json"  # in later rounds: of the model that is cut here
    blueprint = Blueprint.load(step if step.exists() else inputs["blueprint"] / "blueprint.json")
    grams = open_tensors(inputs["hessians"]) if config.restore.outputs else None
    asked = config.reinit.model_dump(include={"slnp", "gain_compensation"})
    stream = begun(anatomy, blueprint, source, kind, **asked, grams=grams, damping=config.restore.damping)
    if config.reinit.bias_compensation:
        stream = compensate_biases(anatomy, blueprint, source, open_tensors(inputs["scores"] / "means"), stream)
        anatomy, kind = biased_anatomy(anatomy), biased_config(kind)
    student = blueprint.student(anatomy)
    watched = machine.progress(stream, len(student.shapes()), "cut")
    config_json = student_config(kind, anatomy, blueprint)
    write_checkpoint(out, config_json, watched, config.checkpoint.shard_bytes, inputs["subject"])
    total, inner = student.parameters()
    machine.say(f"cut: {total / 1e6:.1f}M parameters, {inner / 1e6:.1f}M without embeddings")


STAGE = Stage(
    name="cut",
    makes="initial_student",
    run=run,
    settings=settings,
    needs=("subject", "blueprint"),
    needs_also=needs_also,
    optional=("hessians",),
    enabled=enabled,
    all_ranks=False,
    shows={"initial_student": ""},
)
