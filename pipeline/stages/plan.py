"""plan: the blueprint of the student, from scores and shape; pure, fast, no model needed."""

import json
from pathlib import Path

from pipeline.config import Config
from pipeline.model.anatomy import LayerSizes
from pipeline.model.scores import Scores
from pipeline.prune.plan import kept_layers, plan, shuffled
from pipeline.runtime.checkpoint import open_checkpoint

MAKES = "blueprint"
NEEDS = ("teacher", "scores", "shape")
EVERY_RANK = False
RANDOM = ("channels", "heads", "neurons")


def settings(config: Config) -> dict:
    """Give the plan section, and the seed where a part is drawn at random."""
    drawn = any(getattr(config.plan, kind) == "random" for kind in RANDOM)
    return config.plan.model_dump() | ({"seed": config.seed} if drawn else {})


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write blueprint.json."""
    anatomy = open_checkpoint(inputs["teacher"], config.model.allow_pickle).anatomy
    scores = Scores.load(inputs["scores"] / "scores.safetensors")
    shape = json.loads((inputs["shape"] / "shape.json").read_text())
    settings = config.plan
    hosts = kept_layers(scores.layers, shape["layers"], settings.depth, settings.keep_first)
    scores = shuffled(scores, [kind for kind in RANDOM if getattr(settings, kind) == "random"], config.seed)
    widths = [LayerSizes(shape["heads"], shape["groups"], shape["neurons"])] * len(hosts)
    blueprint = plan(
        anatomy,
        scores,
        hosts,
        widths,
        shape["hidden"],
        clap=settings.clap,
        clap_normalise=settings.clap_normalise,
    )
    blueprint.check(anatomy)
    blueprint.save(out / "blueprint.json")
    dropped = sorted(set(range(len(anatomy.sizes.layers))) - set(hosts))
    donated = sum(group.layer != place.host for place in blueprint.layers for group in place.groups)
    machine.say(f"plan: layers dropped {dropped or 'none'}, KV groups donated across layers {donated}")
