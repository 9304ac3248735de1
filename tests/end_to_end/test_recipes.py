"""Every recipe runs to its end on a tiny model; no stage reads a setting that its artifact does not name."""

import json
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.graph import STAGES
from tests.recording import Record
from tests.tiny_text import CONF, configured
from tests.world import make_world, settings

SMALL = {"evaluate__speed": "false", "evaluate__words": 8, "report__samples": 1, "report__sample_tokens": 2}
WIDTHS = {"shape__layers": None, "shape__neurons": None}  # a budget chooses the shape
ANY = {"budget.parameters": 0.7, "plan.depth_tokens": 128}
ON_POLICY = {"onpolicy.tokens": 64, "onpolicy.prompt_tokens": 8}
ON_POLICY |= {"onpolicy.min_new_tokens": 2, "onpolicy.max_new_tokens": 6}  # two steps of eight answers
# By recipe: what is changed for a tiny model, and the file that the run ends with.
RECIPES: dict[str, tuple[dict[str, object], str]] = {
    "pangu_light": ({"teacher_correction.tokens": 512} | ON_POLICY, "report.html"),
    "auto": ({}, "report.html"),
    "minitron": ({}, "report.html"),
    "best": (
        {"local_distill.tokens": 512, "local_distill.epochs": 1, "plan.depth_tokens": 128, "evaluate.draft": "true"}
        | {"export.gguf": "f32", "export.gguf_converter": Path(__file__).parents[1] / "stand_in_converter.py"},
        "report.html",
    ),
    "adapt_pruner": (ANY | {"recipe.rounds": 2, "plan.amplitude": 0.01}, "report.html"),
    "flap": (ANY, "report.html"),
    "trsp": (ANY | {"layer_gates.tokens": 128, "regularize.tokens": 512}, "report.html"),
    "tyr": (ANY | {"supernet.generations": 2, "supernet.offspring": 2, "supernet.multiple": 4}, "report.html"),
    "generate": (
        {"self_generate.tokens": 64, "self_generate.length": 16, "self_generate.batch_size": 2},
        "generated.jsonl",
    ),
    "recover": (ON_POLICY, "evaluation.json"),
}
# Stages and branches that no recipe selects by default: (recipe, stages, what is changed).
SHORT = "importance,shape,plan,cut"
VARIANTS: dict[str, tuple[str, str, dict[str, object]]] = {
    "search": (
        "pangu_light",
        "importance,shape_search,plan,cut",
        {"recipe.shape": "search", "device/chip": "CPU", "shape_search.candidates": 2, "shape_search.tokens": 64}
        | {"budget.parameters": 0.7, "shape.layers": "null", "shape.neurons": "null"},
    ),
    "rotate": (
        "pangu_light",
        "importance,shape,rotate,plan,cut",
        {"rotate.kind": "principal", "plan.channels": "leading", "rotate.tie": "keep", "shape.hidden": 24}
        | {"rotate.own_axes": 4},
    ),
    "rotate_best": (
        "best",
        "importance,shape,hessian,obs_order,rotate,plan,cut,local_distill",
        {"rotate.kind": "principal", "plan.channels": "leading", "shape.hidden": 24, "plan.depth": "influence"}
        | {"local_distill.tokens": 256, "local_distill.epochs": 1},
    ),
    "sequential": (
        "pangu_light",
        "importance,shape,sequential,plan,cut",
        {"restore.sequential": "true", "plan.clap": "false"},
    ),
    "sensitivity": (
        "pangu_light",
        "importance,shape,hessian,obs_order,sensitivity,plan,cut",
        {"plan.widths": "measured", "restore.outputs": "true", "restore.order": "obs", "plan.clap": "false"}
        | {"sensitivity.levels": "[0.5]", "plan.depth_tokens": 128, "shape.layers": "null", "shape.neurons": "null"},
    ),
    "evolved": (
        "pangu_light",
        "importance,shape,layer_loss,plan,cut",
        {"plan.depth": "evolved", "layer_loss.generations": 1, "layer_loss.offspring": 1, "plan.depth_tokens": 128},
    ),
    "vocabulary": ("pangu_light", f"vocabulary,{SHORT}", {"budget.vocabulary": 64}),
    "bypass": (
        "pangu_light",
        "importance,shape,plan,bypass,cut",
        {"reinit.bypass": "true", "reinit.bypass_tokens": 256, "plan.clap": "false"},
    ),
    "sublayers": (
        "pangu_light",
        "importance,shape,sublayers,plan,cut,local_distill",
        {"shape.attention_layers": 2, "shape.ffn_layers": 3, "shape.layers": "null", "plan.depth_tokens": 128}
        | {"local_distill.tokens": 256, "local_distill.epochs": 1},
    ),
    "sublayers_to_a_budget": (
        "pangu_light",
        "importance,shape,sublayers,plan,cut",
        {"budget.axes": "sublayers", "budget.total": 0.9, "shape.layers": "null", "shape.neurons": "null"}
        | {"sublayers.candidates": 2, "plan.depth_tokens": 128},
    ),
    "random": ("pangu_light", SHORT, {"plan.heads": "random", "plan.neurons": "random", "plan.channels": "random"}),
    "taylor": ("pangu_light", SHORT, {"score.kind": "taylor"}),
    "magnitude": ("pangu_light", SHORT, {"score.kind": "magnitude"}),
}


@pytest.fixture(scope="module")
def record():
    """What the stages of all runs in this module read."""
    return Record()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("recipes"), "llama-tied")


def run(record: Record, world: Path, name: str, *overrides: str, **changed: object) -> Path:
    """Run a configuration in this process, with stages whose reads are recorded; return its run folder."""
    chosen = settings(world, run=name, **SMALL | changed)
    stages = {each: record.watched(stage) for each, stage in STAGES.items()}
    runner.run(configured(*chosen, *overrides), "a test", stages)
    return world / "runs" / name


def dotted(values: dict[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


def test_every_recipe_is_tested():
    assert set(RECIPES) == {path.stem for path in (CONF / "recipe").glob("*.yaml")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_to_its_last_stage(record, world, recipe):
    changed, last = RECIPES[recipe]
    widths = WIDTHS if "budget.parameters" in changed else {}
    if recipe == "recover":
        changed = {"model.start": run(record, world, "start", f"recipe.stages=[{SHORT}]") / "initial_student"}
    folder = run(record, world, recipe, f"recipe={recipe}", *dotted(changed), **widths)
    assert (folder / last).is_file()
    if last == "report.html":
        report = json.loads((folder / "report.json").read_text())
        assert report["parameters"]["student"] < report["parameters"]["teacher"]
        assert ("onpolicy" in report) == ("onpolicy.tokens" in changed)
        drafts = [text["draft"]["acceptance"] for text in report["perplexity"].values() if "draft" in text]
        gguf = folder / "student" / "model.gguf"
        assert gguf.is_file() == ("export.gguf" in changed) == ("gguf" in report)
        assert bool(drafts) == ("evaluate.draft" in changed) and all(0.0 < share <= 1.0 for share in drafts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_runs_to_its_last_stage(record, world, variant):
    recipe, stages, changed = VARIANTS[variant]
    folder = run(record, world, variant, f"recipe={recipe}", f"recipe.stages=[{stages}]", *dotted(changed))
    assert (folder / "initial_student").is_dir()


@pytest.mark.parametrize("absorb", ["auto", "fitted", "removed"])
def test_norms_are_absorbed(record, tmp_path, absorb):
    folder = run(
        record,
        make_world(tmp_path, "glm4"),
        absorb,
        f"recipe.stages=[{SHORT},absorb_norms]",
        f"reinit.absorb={absorb}",
        "reinit.absorb_tokens=256",
    )
    assert (folder / "initial_student").is_dir()


def test_experts_are_narrowed_and_restored(record, tmp_path):
    world = make_world(tmp_path, "qwen2_moe", moe_intermediate_size=16)
    narrow = {"shape.experts": 3, "shape.expert_neurons": 8, "shape.shared_neurons": 8, "restore.outputs": "true"}
    stages = "importance,shape,hessian,plan,cut"
    folder = run(record, world, "experts", f"recipe.stages=[{stages}]", *dotted(narrow), **WIDTHS)
    assert (folder / "initial_student").is_dir()


def test_no_stage_reads_a_setting_that_its_artifact_does_not_name(record):
    """After all runs of this module: settings named by the stage, or by one behind its inputs, or neutral."""
    assert record.ran == set(STAGES)

    assert record.violations() == {}


@pytest.mark.parametrize(("section", "recipe"), [("distill", "minitron"), ("regularize", "trsp")])
def test_text_too_short_to_hold_out_is_refused_before_anything_is_measured(tmp_path, section, recipe):
    chosen = settings(make_world(tmp_path), shape__neurons=None)
    with pytest.raises(ValueError, match=rf"^{section}\.eval_tokens: "):
        runner.run(configured(*chosen, f"recipe={recipe}", f"{section}.eval_tokens=1000000", "run=short"), "a test")
    assert {path.name.partition("-")[0] for path in (tmp_path / "artifacts").glob("*-*")} == {"teacher", "tokens"}
