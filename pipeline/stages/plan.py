"""plan: the blueprint of the student, from scores and shape; pure, fast, no model needed."""

import json
from pathlib import Path

from pipeline.config import Config
from pipeline.model.scores import Scores
from pipeline.prune.plan import leading, plan_uniform
from pipeline.runtime.checkpoint import open_checkpoint

MAKES = "blueprint"
NEEDS = ("teacher", "scores", "shape")
OPTIONAL = ("orders", "depth")  # instead of scores of heads and neurons, and of block influence
EVERY_RANK = False


def settings(config: Config) -> dict:
    """Give the plan section without what was measured before, and the seed where a part is drawn at random."""
    asked = config.plan.model_dump(exclude={"depth_tokens"})
    return asked | ({"seed": config.seed} if config.plan.policy["drawn"] else {})


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write blueprint.json."""
    anatomy = open_checkpoint(inputs["teacher"], config.model.allow_pickle).anatomy
    scores = Scores.load(inputs.get("orders", inputs["scores"]) / "scores.safetensors")
    shape = json.loads((inputs["shape"] / "shape.json").read_text())
    if config.plan.channels == "leading":
        scores = leading(scores)
    hosts = json.loads((inputs["depth"] / "depth.json").read_text())["kept"] if "depth" in inputs else None
    blueprint = plan_uniform(anatomy, scores, shape, **config.plan.policy, seed=config.seed, hosts=hosts)
    blueprint.check(anatomy)
    blueprint.save(out / "blueprint.json")
    dropped = sorted(set(range(len(anatomy.sizes.layers))) - {place.host for place in blueprint.layers})
    donated = sum(group.layer != place.host for place in blueprint.layers for group in place.groups)
    machine.say(f"plan: layers dropped {dropped or 'none'}, KV groups donated across layers {donated}")
