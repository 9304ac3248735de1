"""plan: the blueprint of the student, from scores and shape; pure, fast, no model needed."""

import json
from pathlib import Path

from pipeline.config import Config
from pipeline.model.anatomy import LayerSizes
from pipeline.model.scores import Scores
from pipeline.prune.plan import leading, plan_by
from pipeline.runtime.checkpoint import open_checkpoint

MAKES = "blueprint"
NEEDS = ("teacher", "scores", "shape")
OPTIONAL = ("restored", "orders", "depth")  # instead of scores of heads and neurons, and of block influence
EVERY_RANK = False


def settings(config: Config) -> dict:
    """Give the plan section without what was measured before, and the seed where a part is drawn at random."""
    asked = config.plan.model_dump(exclude={"depth_tokens"})
    return asked | ({"seed": config.seed} if config.plan.policy["drawn"] else {})


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write blueprint.json."""
    anatomy = open_checkpoint(inputs["teacher"], config.model.allow_pickle).anatomy
    scores = Scores.load(_found(inputs, "scores.safetensors"))
    shape = json.loads((inputs["shape"] / "shape.json").read_text())
    if config.plan.channels == "leading":
        scores = leading(scores)
    hosts = json.loads((inputs["depth"] / "depth.json").read_text())["kept"] if "depth" in inputs else None
    widths = _widths(inputs, shape, len(anatomy.sizes.layers))
    hidden, count = shape["hidden"], shape["layers"]
    blueprint = plan_by(anatomy, scores, widths, hidden, count, **config.plan.policy, seed=config.seed, hosts=hosts)
    blueprint.check(anatomy)
    blueprint.save(out / "blueprint.json")
    dropped = sorted(set(range(len(anatomy.sizes.layers))) - {place.host for place in blueprint.layers})
    donated = sum(group.layer != place.host for place in blueprint.layers for group in place.groups)
    machine.say(f"plan: layers dropped {dropped or 'none'}, KV groups donated across layers {donated}")


def _found(inputs: dict[str, Path], file: str) -> Path:
    """Give the file of the latest stage that says which heads and neurons stay."""
    folders = [inputs[artifact] for artifact in ("restored", "orders", "scores") if artifact in inputs]
    return next(folder / file for folder in folders if (folder / file).exists())


def _widths(inputs: dict[str, Path], shape: dict[str, int], layers: int) -> list[LayerSizes]:
    """Give the widths of every teacher layer: those that restored weights were made for, or the shape's."""
    made = inputs["restored"] / "widths.json" if "restored" in inputs else None
    if made and made.exists():
        return [LayerSizes(**each) for each in json.loads(made.read_text())]
    return [LayerSizes(shape["heads"], shape["groups"], shape["neurons"])] * layers
