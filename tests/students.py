"""Students and model folders for tests: tiny models cut into layers of unequal width, folders imported as stages do."""

from pathlib import Path

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, Group, LayerPlan
from pipeline.model.hf_config import student_config
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint import Checkpoint, open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.device import open_device
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import import_model, locate
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.tracker import Track
from tests.tiny import config_of, tensors_of, tiny_model

MIXED = (
    LayerPlan(0, (Group(0, 0, (0, 1)),), tuple(range(24))),
    LayerPlan(1, (Group(1, 0, (0,)), Group(1, 1, (3,))), tuple(range(8))),
    LayerPlan(2, (Group(2, 1, (2, 3)),), tuple(range(16))),
    LayerPlan(3, (Group(3, 1, (2,)),), tuple(range(3, 24))),
)
SUBLAYERS = (  # layers of all widths without attention, or without an FFN
    MIXED[0],
    LayerPlan(1, (), tuple(range(16))),
    LayerPlan(2, MIXED[2].groups, ()),
    LayerPlan(3, (Group(3, 0, (0, 1)), Group(3, 1, (2, 3))), tuple(range(24))),
)


def student(kind, folder, plans=MIXED, channels=32, **changed):
    """Write the student of a tiny model as the stages do, and return its checkpoint."""
    model = tiny_model(kind, **changed)
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    blueprint = Blueprint(tuple(range(channels)), plans)
    config = student_config(config_of(model), anatomy, blueprint)
    write_checkpoint(folder, config, cut(anatomy, blueprint, tensors_of(model)), 1e9)
    return open_checkpoint(folder)


def machine() -> Machine:
    """Return a machine of one rank on the CPU that tracks nothing."""
    return Machine(open_device("cpu", "auto", False, 0, 0), Ranks(0, 1, 0), Track())


def imported(path: Path, folder: Path, trusted: bool = False, allow_pickle: bool = False) -> Checkpoint:
    """Import the model at a path into a folder, as the stage `teacher` does, and return its checkpoint."""
    return import_model(locate(str(path), "model.path", allow_pickle), folder, "model.path", 1e9, trusted)
