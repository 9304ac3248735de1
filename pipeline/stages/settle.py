"""settle: the teacher is trained until the layers that go write little, so that they can be deleted (TRSP, stage 2)."""

import json
from pathlib import Path

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.distill.settling import Settling
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.ranks import place
from pipeline.training import accumulation, settings_of, steps_of, train_model

MAKES = "restored"
NEEDS = ("teacher", "tokens", "depth")
EVERY_RANK = True
RESUMES = True  # goes on from the checkpoints an interrupted attempt left


def needed(config: Config) -> bool:
    """Whether the layers that go are emptied first."""
    return config.settle.norm != "none"


def check(config: Config) -> None:
    """Refuse batches that cannot be divided and runs shorter than a step, before any work."""
    if needed(config):
        accumulation("settle", config.settle, place()[1])
        steps_of("settle", config.settle, config.data.sequence)


def settings(config: Config) -> dict:
    """Give what determines the settled weights; how the work is spread over ranks and memory does not."""
    return settings_of(config, config.settle, {"chunk"})


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write the settled teacher as a model folder in float32, and metrics.jsonl."""
    asked = config.settle
    teacher = open_checkpoint(inputs["teacher"], config.model.allow_pickle)
    kept = json.loads((inputs["depth"] / "depth.json").read_text())["kept"]
    picked = sorted(set(range(len(teacher.anatomy.sizes.layers))) - set(kept))
    train_model(
        "settle",
        config,
        teacher,
        lambda load: Settling(
            load(inputs["teacher"]), picked, asked.weight, asked.norm, asked.chunk, asked.gradient_checkpointing
        ),
        Packed(inputs["tokens"] / "recovery"),
        out,
        machine,
    )
