"""regularize: the subject is trained until the layers to be removed add little, so that they can be deleted (TRSP)."""

from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.distill.regularize import Settling
from pipeline.model.shape import Depth
from pipeline.runtime.machine import Machine
from pipeline.runtime.ranks import place
from pipeline.stages.models import checkpoint
from pipeline.stages.stage import Inputs, Stage
from pipeline.training import train_model
from pipeline.training_settings import accumulation, check_text, settings_of, steps_of


def enabled(config: Config) -> bool:
    """Return whether layers are regularized before they are removed."""
    return config.regularize.norm != "none"


def check(config: Config) -> None:
    """Refuse batches that cannot be divided and runs shorter than a step, before any work."""
    if enabled(config):
        accumulation("regularize", config.regularize, place()[1])
        steps_of("regularize", config.regularize, config.data.sequence_length)


def settings(config: Config) -> dict[str, Any]:
    """Return what determines the trained weights."""
    return settings_of(config, config.regularize, set())


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the trained subject as a model folder in float32, and metrics.jsonl."""
    section = config.regularize
    subject = checkpoint(config, inputs["subject"])
    kept = Depth.load(inputs["depth"]).kept
    removed = sorted(set(range(len(subject.anatomy.sizes.layers))) - set(kept))
    train_model(
        "regularize",
        config,
        subject,
        lambda load: Settling(
            load(inputs["subject"]),
            removed,
            section.weight,
            section.norm,
            config.logits.chunk,
            section.gradient_checkpointing,
        ),
        Packed(inputs["tokens"] / "recovery"),
        out,
        machine,
    )


STAGE = Stage(
    name="regularize",
    makes="restored",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "depth"),
    becomes=("subject",),
    enabled=enabled,
    check=check,
    check_text=partial(check_text, "regularize"),
    resumable=True,  # continues from the checkpoints of an interrupted attempt
    shows={"restored": ""},
)
