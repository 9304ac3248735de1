"""recipe=auto is a named recipe, beside which every typed setting wins; a run repeats from its record."""

import json

import pytest

from pipeline import runner
from pipeline.cli.command import configurations
from pipeline.cli.compose import composed
from pipeline.cli.words import parsed
from pipeline.config import validate
from tests.world import make_world, pipeline, settings

CHOSEN = {
    "": ("best", "neurons"),
    "budget.parameters=0.75": ("best", "neurons"),
    "budget.total=0.8": ("best", "neurons"),
    "budget.total=0.4": ("best", "all"),
    "budget.bytes=1e8": ("best", "all"),
    "budget.bytes=1e8 budget.context=1024": ("best", "all"),
    "budget.speedup=1.5 device/chip=910B3": ("best", "all"),
    "budget.speedup=1.5 recipe.shape=search device/chip=910B3": ("best", "all"),
    "shape.layers=26": ("best", "all"),
    "stages=[importance,shape,plan,cut]": ("best", "neurons"),
    "distill.tokens=2000000000": ("pangu_light", "all"),
    "model.start=FOLDER": ("recover", "all"),
    "shape.experts=4": ("pangu_light", "all"),
    "budget.axes=experts budget.total=0.8": ("pangu_light", "experts"),
    "budget.active_parameters=0.8": ("pangu_light", "all"),
}


@pytest.mark.parametrize("typed", CHOSEN)
def test_a_request_chooses_a_recipe_and_states_the_reason(typed):
    config = validate(composed([*typed.split(), "recipe=auto"]))
    assert (config.recipe.name, config.budget.axes) == CHOSEN[typed]
    assert config.recipe.reason and config.run == config.recipe.name
    named = validate(composed([*typed.split(), f"recipe={config.recipe.name}", f"budget.axes={config.budget.axes}"]))
    recipe = config.recipe.model_copy(update={"reason": None})
    assert config.model_copy(update={"recipe": recipe}) == named


def test_typed_settings_win_over_those_of_the_chosen_recipe():
    config = validate(composed(["shape.layers=26", "recipe=auto", "budget.axes=layers", "plan.depth=influence"]))
    assert (config.budget.axes, config.plan.depth) == ("layers", "influence")
    with pytest.raises(ValueError, match=r"^distill\.tokens: 'many' is not valid"):
        validate(composed(["recipe=auto", "distill.tokens=many"]))


def test_each_point_of_a_sweep_chooses_for_itself():
    points = configurations(parsed(["--multirun", "recipe=auto", "budget.total=0.9,0.4"]))
    assert [config.budget.axes for config, _ in points] == ["neurons", "all"]


@pytest.mark.slow
def test_the_choice_is_recorded_and_a_recorded_run_repeats_without_work(tmp_path):
    world = make_world(tmp_path)
    only = "stages=[importance,shape]"
    said = pipeline("recipe=auto", *settings(world, run="first"), only, cwd=world).stdout
    record = json.loads((world / "runs" / "first" / "run.json").read_text())
    reason = record["config"]["recipe"]["reason"]
    assert record["config"]["recipe"]["name"] == "best" and reason in said
    config = validate(composed([], source=world / "runs" / "first" / "run.json"))
    assert config.model_dump(mode="json") == record["config"]
    again = validate(composed(["run=again"], source=world / "runs" / "first"))
    runner.run(again, "a test")
    stages = json.loads((world / "runs" / "again" / "run.json").read_text())["stages"]
    assert stages and not any(stage["made_now"] for stage in stages.values())
    assert {name: stage["artifact"] for name, stage in stages.items()} == {
        name: stage["artifact"] for name, stage in record["stages"].items()
    }
