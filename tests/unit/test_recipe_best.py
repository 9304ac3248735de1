"""The stages beside the paper on tiny models: principal basis, restoration, removal order, depth by measured loss."""

import json
import math
from dataclasses import replace

import pytest
import torch

from pipeline import runner
from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import beginning
from pipeline.evaluation.perplexity import tally
from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, everything
from pipeline.model.hf_config import student_config
from pipeline.model.scores import Scores
from pipeline.prune.importance.measure import measure, only_layers
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint import open_checkpoint, open_tensors
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.restoration import output_error
from tests.tiny import config_of, tensors_of, tiny_model, tokens
from tests.tiny_text import configured
from tests.world import make_world, pipeline, settings

PRINCIPAL = {"rotate.kind": "principal", "plan.channels": "leading", "rotate.own_axes": 8}
BASIS = ["recipe=best", "rotate.kind=principal", "plan.channels=leading", "rotate.tie=keep", "rotate.own_axes=4"]
CUT = ["importance", "shape", "rotate", "hessian", "obs_order", "layer_loss", "plan", "cut"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("best"), "llama-tied")


def made(world, stages, *overrides, **values):
    """Run stages in this process; give their artifacts by name."""
    chosen = settings(world, **values, run="unit", stages="[" + ",".join(stages) + "]")
    return runner.run(configured(*chosen, *overrides), "a test")


def whole(**changed):
    """Overrides that keep the teacher's widths but for `changed`."""
    return {f"shape__{axis}": changed.get(axis, "null") for axis in ("layers", "hidden", "heads", "groups")} | {
        "shape__neurons": changed.get("neurons", 24)
    }


def dotted(values):
    return [f"{name}={value}" for name, value in values.items()]


def logits(folder):
    with torch.no_grad():
        return load_model(folder, torch.float64, "eager")(tokens()).logits


@pytest.mark.parametrize(("tie", "axes"), [("untied", 8), ("keep", 32)])
def test_a_full_width_basis_leaves_the_teachers_logits_through_the_stages(world, tie, axes):
    """Untied exactly; tied where every channel keeps an axis of its own. Weights are float32 on disk."""
    chosen = dotted(PRINCIPAL | {"rotate.tie": tie, "rotate.own_axes": axes})
    folders = made(world, CUT, *chosen, "plan.clap=false", **whole())
    kinds = {name: open_checkpoint(folders[name]) for name in ("teacher", "rotated", "initial_student")}
    own = tie == "untied"
    assert ("lm_head.weight" in kinds["initial_student"]) == own and kinds["initial_student"].config[
        "tie_word_embeddings"
    ] != own
    dense = logits(folders["teacher"])
    for name in ("rotated", "initial_student"):
        embeddings = [kinds[key]["model.embed_tokens.weight"] for key in ("teacher", name)]
        assert not torch.allclose(*embeddings, atol=1e-3)
        assert (logits(folders[name]) - dense).norm() / dense.norm() < 1e-4


def test_slnp_after_a_principal_cut_is_the_root_of_the_widths(world):
    folders = made(world, CUT, *dotted(PRINCIPAL | {"rotate.tie": "untied"}), **whole(hidden=20))
    start = open_checkpoint(folders["initial_student"])
    assert Blueprint.load(folders["blueprint"]).channels == tuple(range(20))
    for pattern in start.anatomy.norms:
        gain = start[pattern.format(layer=1)]
        torch.testing.assert_close(gain, torch.full((20,), math.sqrt(32 / 20)), rtol=1e-6, atol=0)


def test_a_turned_stream_changes_no_score_of_heads_neurons_and_layers(world):
    """Why scores, Gram matrices and depth are measured on the teacher, whatever the basis."""
    folders = made(world, CUT, *dotted(PRINCIPAL), **whole(hidden=20))
    one, other = (
        measure(load_model(folder, torch.float64, "eager").model, open_checkpoint(folder).anatomy, [tokens()]).scores()
        for folder in (folders["teacher"], folders["rotated"])
    )
    assert not torch.allclose(one.channels, other.channels, rtol=1e-2)
    for kind in ("heads", "neurons"):
        for here, there in zip(getattr(one, kind), getattr(other, kind), strict=True):
            torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.layers, other.layers, rtol=1e-5, atol=1e-6)


def errors(folders):
    """Return the output error of W_O and W_down of every student layer against its host, on the calibration text."""
    teacher, start = (open_checkpoint(folders[name]) for name in ("teacher", "initial_student"))
    grams = open_tensors(folders["hessians"])
    blueprint = Blueprint.load(folders["blueprint"])
    found = {}
    for place, plan in enumerate(blueprint.layers):
        heads = [head * 8 + i for group in plan.groups for head in group.heads for i in range(8)]
        for module, kept in (("self_attn.o_proj", heads), ("mlp.down_proj", plan.neurons)):
            name, host = f"model.layers.{place}.{module}", f"model.layers.{plan.host}.{module}"
            columns = start[f"{name}.weight"].double()
            found[name] = output_error(teacher[f"{host}.weight"], columns, grams[host], list(kept))
    return found


NARROW = whole(layers=3, heads=2, groups=1, neurons=12)


def test_restoration_never_raises_the_error_and_its_order_lowers_it_further(world):
    """The same text, all widths cut at once: plain, restored, and restored in the order of least restored error."""
    runs = {
        "plain": ["restore.order=obs", "restore.outputs=false", "plan.clap=false"],
        "restored": ["restore.outputs=true", "plan.clap=false"],
        "obs": ["restore.outputs=true", "restore.order=obs", "plan.clap=false", "restore.at_once=1"],
    }
    found = {name: made(world, CUT, *chosen, **NARROW) for name, chosen in runs.items()}
    unrestored = made(world, CUT, "plan.clap=false", **NARROW) | {"hessians": found["restored"]["hessians"]}
    assert found["plain"]["hessians"] == found["obs"]["hessians"], "what is measured once serves every choice"
    restored, ordered, plain = (errors(found[name]) for name in ("restored", "obs", "plain"))
    scored = errors(unrestored)
    for name in scored:
        assert restored[name] < scored[name] * (1 + 1e-6), name
        assert ordered[name] < plain[name] * (1 + 1e-6), name
    assert sum(ordered.values()) < sum(restored.values()) < 0.9 * sum(scored.values())


def test_gram_matrices_do_not_depend_on_how_many_fit_in_memory(world):
    chosen = ("restore.outputs=true", "plan.clap=false")
    together = open_tensors(made(world, CUT, *chosen, **whole())["hessians"])
    apart = made(world, CUT, *chosen, "restore.memory=1", f"artifacts={world / 'apart'}", **whole())["hessians"]
    assert len(list(apart.glob("layer-*.safetensors"))) == 4 and len(together) == 8
    for name, matrix in open_tensors(apart).items():
        torch.testing.assert_close(matrix, together[name], rtol=1e-9, atol=1e-9)


def test_depth_by_loss_keeps_the_layers_of_least_measured_loss(world):
    """One layer goes: of all layers, the one whose absence, in a checkpoint really cut, costs least."""
    chosen = ["plan.depth=loss", "plan.depth_tokens=256", "plan.clap=false", "calibration.batch_size=4"]
    folders = made(world, CUT, *chosen, **whole(layers=3))
    found = json.loads((folders["depth"] / "depth.json").read_text())
    blueprint = Blueprint.load(folders["blueprint"])
    assert [plan.host for plan in blueprint.layers] == found["kept"] and len(found["tried"]) == 3
    assert found["loss"] == min(each["loss"] for each in found["tried"])
    batches = beginning(Packed(folders["tokens"] / "calibration"), 256, 4, 0, 1, 0)
    sums = tally(load_model(folders["initial_student"], torch.float32, "eager"), batches, 64)
    assert float(sums[0] / sums[2]) == pytest.approx(found["loss"], rel=2e-2)


def test_where_all_layers_stay_no_loss_is_measured(world):
    folders = made(world, CUT, "plan.depth=loss", "plan.clap=false", **whole())
    found = json.loads((folders["depth"] / "depth.json").read_text())
    assert found == {"kept": [0, 1, 2, 3], "loss": None, "tried": []}


def test_two_ranks_measure_what_one_measures(world):
    """Gram matrices, energies and losses add over ranks; layers are ordered in turns. Layers compute in bf16 here."""
    chosen = [*BASIS, "plan.depth_tokens=256", "shape.layers=3"]
    one = made(world, CUT, *chosen, "calibration.batch_size=8", "shape.hidden=24", "shape.heads=2", "shape.groups=1")
    widths = {"shape__hidden": 24, "shape__heads": 2, "shape__groups": 1, "artifacts": world / "two"}
    stages = f"stages=[{','.join(CUT)}]"
    pipeline("run=two", *chosen, "calibration.batch_size=4", stages, *settings(world, **widths), cwd=world, ranks=2)
    view = world / "runs" / "two"
    sources = (one["rotated"], view / "rotated")
    energies = [json.loads((folder / "basis.json").read_text())["energy"] for folder in sources]
    torch.testing.assert_close(torch.tensor(energies[0]), torch.tensor(energies[1]), rtol=2e-2, atol=2e-2)
    (grams,) = (world / "two").glob("hessian-*")
    for name, matrix in open_tensors(one["hessians"]).items():
        assert (open_tensors(grams)[name] - matrix).norm() / matrix.norm() < 1e-2, name
    (orders,) = (world / "two").glob("obs_order-*")
    for each in Scores.load(orders).neurons:
        assert sorted(each.tolist()) == list(range(1, 25))
    depths = (one["depth"], *(world / "two").glob("layer_loss-*"))
    losses = [json.loads((folder / "depth.json").read_text())["loss"] for folder in depths]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3"])
def test_passing_layers_by_equals_cutting_them_away(kind, tmp_path):
    model = tiny_model(kind)
    config, source = config_of(model), tensors_of(model)
    anatomy = anatomy_of(config, source)
    plan = everything(anatomy.sizes)
    plan = replace(plan, layers=(plan.layers[0], plan.layers[3]))
    write_checkpoint(tmp_path, student_config(config, anatomy, plan), cut(anatomy, plan, source), 1e9)
    with torch.no_grad():
        dense = model(tokens()).logits
        with only_layers(model, 4, (0, 3)):
            skipped = model(tokens()).logits
        assert torch.equal(model(tokens()).logits, dense)
        wanted = load_model(tmp_path, torch.float64, "eager")(tokens()).logits
    assert (skipped - wanted).norm() / wanted.norm() < 1e-5  # the classes compute some parts in float32
    assert (skipped - dense).norm() / dense.norm() > 1e-2


@pytest.mark.parametrize("recipe", ["pangu_light", "minitron", "best"])
def test_every_recipe_composes_and_validates(recipe):
    config = configured(f"recipe={recipe}")
    assert isinstance(config, Config) and config.recipe.name == recipe
    runner.check(config)


@pytest.mark.parametrize("recipe", ["pangu_light", "minitron"])
def test_recipes_of_papers_need_none_of_the_stages_beside_them(recipe):
    config = configured(f"recipe={recipe}")
    assert not any(runner.STAGES[name].enabled(config) for name in ("rotate", "hessian", "obs_order", "layer_loss"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rotate.kind=principal"], "set plan.channels=leading"),
        (["plan.channels=leading"], "set rotate.kind=principal"),
        (["restore.order=obs"], "plan.clap=false or restore.order=scores"),
        ([*BASIS, "distill.loss.hidden=1.0"], r"distill\.loss: .*distill\.loss\.hidden=0"),
        ([*BASIS, "recipe.stages=[importance,shape,hessian,obs_order,plan,cut]"], "needs layer_loss, rotate"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_before_any_work(overrides, message):
    with pytest.raises(ValueError, match=message):
        runner.check(configured(*overrides))


def test_a_part_without_a_stage_its_settings_ask_for_says_which(world):
    with pytest.raises(ValueError, match="cut reads rotated, which rotate makes; add rotate to stages"):
        made(world, ["importance", "shape", "plan", "cut"], *dotted(PRINCIPAL), "seed=5", **whole(hidden=24))


def test_a_model_with_post_norms_is_refused_before_its_stream_is_measured(tmp_path):
    world = make_world(tmp_path, "glm4")
    with pytest.raises(ValueError, match="post-norms .* do not commute"):
        made(world, CUT, *dotted(PRINCIPAL), **whole())


def test_too_many_axes_of_their_own_are_refused(world):
    with pytest.raises(ValueError, match=r"rotate\.own_axes: 40 of 32"):
        made(world, CUT, *dotted(PRINCIPAL | {"rotate.tie": "keep", "rotate.own_axes": 40}), **whole())


def test_the_best_recipe_runs_to_its_report(world):
    """Every width at once, by the real command, from a tied teacher to a tied student that stock transformers loads."""
    chosen = settings(world, shape__hidden=24, shape__heads=2, shape__groups=1, shape__neurons=12)
    said = pipeline(*BASIS, "run=best", *chosen, "plan.depth_tokens=256", cwd=world).stdout
    view = world / "runs" / "best"
    report = json.loads((view / "report.json").read_text())
    assert {"rotate", "hessian", "obs_order", "layer_loss", "cut", "distill"} <= set(report["stages"])
    energy = json.loads((view / "rotated" / "basis.json").read_text())["energy"]
    assert report["cut"]["channel_score_kept"] == pytest.approx(sum(energy[:24]) / sum(energy)) and "rotate: " in said
    student = open_checkpoint(view / "student")
    assert student.anatomy.tied and student.config["hidden_size"] == 24 and student.config["num_hidden_layers"] == 3
    assert json.loads((view / "blueprint.json").read_text())["channels"] == list(range(24))
