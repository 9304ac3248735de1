"""cut: the student's checkpoint, streamed out of the subject's by the blueprint, and re-initialised."""

import shutil
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.model.blueprint import to_cut
from pipeline.model.hf_config import student_config
from pipeline.prune.surgery.bias import biased_anatomy, biased_config, compensate_biases
from pipeline.prune.surgery.bypass import Replaced
from pipeline.prune.surgery.initial_student import begun
from pipeline.prune.surgery.projector import check_layers, narrowed
from pipeline.runtime.checkpoint import open_tensors
from pipeline.runtime.checkpoint_writer import write_checkpoint, write_wrapper_parts
from pipeline.runtime.disk import need_space
from pipeline.runtime.machine import Machine
from pipeline.stages.models import checkpoint
from pipeline.stages.stage import Inputs, Stage


def enabled(config: Config) -> bool:
    """Return whether the student is cut here."""
    return config.model.start is None


def settings(config: Config) -> dict[str, Any]:
    """Return what changes the cut weights: stabilised gains, compensation and restored outputs."""
    return {
        "reinit": config.reinit.model_dump(include={"slnp", "gain_compensation", "bias_compensation"}),
        "damping": config.restore.damping if config.restore.outputs else None,
    }


def needs_also(config: Config) -> tuple[str, ...]:
    """Return the scores where biases are compensated: their artifact holds the means."""
    return ("scores",) if config.reinit.bias_compensation else ()


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the student before recovery as a model folder, one shard in memory at a time."""
    source = checkpoint(config, inputs["subject"])
    need_space(out, source.bytes())
    shutil.rmtree(out, ignore_errors=True)
    anatomy, config_json = source.anatomy, source.config
    blueprint, wrapper_parts = to_cut(inputs["blueprint"]), source.wrapper_parts
    if wrapper_parts is not None:
        check_layers(wrapper_parts.wrapper, wrapper_parts.injected(), blueprint)
    tensors = Replaced(source, open_tensors(inputs["bypassed"])) if "bypassed" in inputs else source
    options = config.reinit.model_dump(include={"slnp", "gain_compensation"})
    if config.restore.outputs:
        options |= {"grams": open_tensors(inputs["hessians"]), "damping": config.restore.damping}
    stream = begun(anatomy, blueprint, tensors, config_json, **options)
    if config.reinit.bias_compensation:
        stream = compensate_biases(anatomy, blueprint, tensors, open_tensors(inputs["scores"] / "means"), stream)
        anatomy, config_json = biased_anatomy(anatomy), biased_config(config_json)
    student = blueprint.student(anatomy)
    shown = machine.progress(stream, len(student.shapes()), "cut")
    written = student_config(config_json, anatomy, blueprint)
    write_checkpoint(out, written, shown, config.checkpoint.shard_bytes, inputs["subject"])
    if wrapper_parts is not None:
        carried = narrowed(wrapper_parts.wrapper, wrapper_parts.tensors, blueprint)
        write_wrapper_parts(out, wrapper_parts, carried, config.checkpoint.shard_bytes)
    total, inner = student.parameters()
    total_before, inner_before = source.anatomy.parameters()
    machine.say(
        f"cut: {total / 1e6:.1f}M parameters ({total / total_before:.1%} of those before), {inner / 1e6:.1f}M without "
        f"embeddings ({inner / inner_before:.1%})"
    )


STAGE = Stage(
    name="cut",
    makes="initial_student",
    run=run,
    settings=settings,
    needs=("subject", "blueprint"),
    needs_also=needs_also,
    optional=("restored", "rotated", "hessians", "bypassed"),  # the first two make the subject, where requested
    enabled=enabled,
    all_ranks=False,
    shows={"initial_student": ""},
)
