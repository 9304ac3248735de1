"""A neutral setting changes no artifact's name; the others that a stage returns do."""

from typing import Any

import pytest

from pipeline.config import Config, validate
from pipeline.config.neutral import NEUTRAL, is_neutral
from pipeline.graph import STAGES
from pipeline.runtime.hashing import digest
from tests.tiny_text import configured
from tests.world import make_world, settings

OTHER = {
    "runs": "elsewhere",
    "artifacts": "elsewhere",
    "stages": ["plan"],
    "verify": "size",
    "output": "delivered",
    "recipe.reason": "the fastest",
    "track.tool": "tensorboard",
    "track.mode": "online",
    "track.project": "other",
    "track.entity": "somebody",
    "track.group": "together",
    "track.tags": ["one"],
    "calibrate.name": "other",
    "calibrate.folder": "elsewhere",
    "device.kernels": "reference",
    "device.layer_streaming": True,
    "distill.loss.kernel": "reference",
    "deepspeed.stage": 3,
    "export.gguf_converter": "elsewhere.py",
    "evaluate.vllm_python": "elsewhere/python",
}  # where neither negating a switch nor adding to a number gives another value
RECIPES = {
    "pangu_light": (),
    "best": ("budget.parameters=0.7",),
    "adapt_pruner": ("budget.parameters=0.7",),
    "tyr": ("budget.parameters=0.7",),
    "trsp": ("budget.parameters=0.7", "teacher_correction.tokens=1024"),
    "flap": ("budget.parameters=0.7",),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("neutral"))


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every setting by its dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name not in ("extra", "chip"):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def changed(config: Config, name: str) -> Config:
    """Return the configuration with another value of one setting."""
    values = config.model_dump()
    *sections, last = name.split(".")
    section = values
    for each in sections:
        section = section[each]
    now = section[last]
    section[last] = OTHER[name] if name in OTHER else not now if isinstance(now, bool) else now + 1
    assert section[last] != now
    return validate(values)


def digests(config: Config) -> dict[str, str]:
    """Return by stage the digest of what its own settings add to its artifact's name."""
    return {name: digest(stage.settings(config)) for name, stage in STAGES.items()}


def test_every_neutral_name_is_a_setting_or_a_section(world):
    names = leaves(configured(*settings(world)).model_dump())
    for neutral in NEUTRAL:
        assert neutral in names or any(name.startswith(f"{neutral}.") for name in names), neutral


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_neutral_setting_changes_no_digest(world, recipe):
    shape = {"shape__layers": None, "shape__neurons": None}
    overrides = (f"recipe={recipe}", "device/chip=CPU", *RECIPES[recipe])
    config = configured(*settings(world, model__start=world / "model", **shape), *overrides)
    before = digests(config)
    for name in filter(is_neutral, leaves(config.model_dump())):
        assert digests(changed(config, name)) == before, name


def test_a_setting_that_determines_an_artifact_changes_its_digest(world):
    config = configured(*settings(world, model__start=world / "model"), "device/chip=CPU")
    before = digests(config)
    for name, stage in (
        ("seed", "importance"),
        ("score.tokens", "importance"),
        ("distill.learning_rate", "distill"),
        ("onpolicy.max_new_tokens", "onpolicy"),
        ("evaluate.tokens", "evaluate"),
        ("reinit.slnp", "cut"),
        ("data.sequence_length", "tokens"),
    ):
        assert digests(changed(config, name))[stage] != before[stage], name
