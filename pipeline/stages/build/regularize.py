"""settle: the teacher is trained until the layers that go write little, so that they can be deleted (TRSP, stage 2)."""

import json
from pathlib import Path

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.distill.regularize import Settling
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.machine import Machine
from pipeline.runtime.ranks import place
from pipeline.stages.stage import Inputs, Stage
from pipeline.training import accumulation, settings_of, steps_of, train_model


def enabled(config: Config) -> bool:
    """Whether the layers that go are emptied first."""
    return config.regularize.norm != "none"


def check(config: Config) -> None:
    """Refuse batches that cannot be divided and runs shorter than a step, before any work."""
    if enabled(config):
        accumulation("regularize", config.regularize, place()[1])
        steps_of("regularize", config.regularize, config.data.sequence_length)


def settings(config: Config) -> dict:
    """Give what determines the settled weights; how the work is spread over ranks and memory does not."""
    return settings_of(config, config.regularize, set())


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the settled teacher as a model folder in float32, and metrics.jsonl."""
    asked = config.regularize
    teacher = open_checkpoint(inputs["subject"], config.model.allow_pickle)
    kept = json.loads((inputs["depth"] / "depth.json").read_text())["kept"]
    picked = sorted(set(range(len(teacher.anatomy.sizes.layers))) - set(kept))
    train_model(
        "regularize",
        config,
        teacher,
        lambda load: Settling(
            load(inputs["subject"]), picked, asked.weight, asked.norm, config.logits.chunk, asked.gradient_checkpointing
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
    resumable=True,  # goes on from the checkpoints an interrupted attempt left
    shows={"restored": ""},
)
