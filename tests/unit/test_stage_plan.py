"""Kinds of scores, widths by layer and compensating biases through the stages, on tiny models."""

import json

import pytest
import torch

from pipeline import runner
from pipeline.data.packing import Packed
from pipeline.data.stream import beginning
from pipeline.distill.layer_errors import LayerErrors
from pipeline.distill.next_token import LanguageHead
from pipeline.model.blueprint import Blueprint
from pipeline.model.scores import Scores
from pipeline.model.sizes import LayerSizes
from pipeline.prune.importance import SCORES
from pipeline.prune.importance.moments import moments
from pipeline.prune.importance.score import Measured
from pipeline.prune.importance.taylor import gradients
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.tiny_text import configured
from tests.world import make_world, pipeline, settings

WIDE = {"num_key_value_heads": 4, "intermediate_size": 128}  # eight multiples of neurons, four groups
NO_SHAPE = {"shape__layers": None, "shape__neurons": None}
CUT = "stages=[importance,shape,plan,cut]"
SEQUENCE = ["stages=[importance,shape,sequential,plan,cut]", "plan.clap=false"]
TYR = ["stages=[importance,shape,supernet,plan,cut]", "recipe=tyr", "supernet.generations=0", "supernet.multiple=8"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("widths"), **WIDE)


def made(world, *overrides, **values):
    return runner.run(configured(*settings(world, run="unit", **(NO_SHAPE | values)), *overrides), "a test")


def scored(folders):
    return Scores.load(folders["scores"])


def near(found, wanted):
    """Within the rounding of bf16, in which the stage computes where the processor does."""
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() / other.norm() < 2e-2


@pytest.mark.parametrize("kind", ["taylor", "fluctuation", "magnitude"])
def test_a_kind_replaces_the_scores_of_heads_and_neurons_alone(world, kind):
    folders = made(world, f"score.kind={kind}", "stages=[importance]")
    plain, found = scored(made(world, "stages=[importance]")), scored(folders)
    assert torch.equal(plain.channels, found.channels) and torch.equal(plain.layers, found.layers)
    source = open_checkpoint(folders["teacher"])
    model, anatomy = load_model(folders["teacher"], torch.float64, "eager"), source.anatomy
    batches = beginning(Packed(folders["tokens"] / "calibration"), 1024, 8, 0, 1, 0)
    needed = {
        "taylor": lambda: {"gradients": gradients(model, anatomy, batches, LanguageHead(model, 64))},
        "fluctuation": lambda: {"moments": moments(model.model, anatomy, batches)},
        "magnitude": dict,
    }[kind]()
    heads, neurons, _ = SCORES[kind].compute(anatomy, source, Measured(plain, **needed))
    near(found.heads, heads)
    near(found.neurons, neurons)


@pytest.mark.parametrize("kind", ["taylor", "fluctuation"])
def test_two_ranks_score_what_one_scores(world, kind):
    """Gradients add before they are made absolute: with as many tokens as here, the other order is far off."""
    one = scored(made(world, f"score.kind={kind}", "stages=[importance]", "reinit.bias_compensation=true"))
    more = (f"score.kind={kind}", "calibration.batch_size=4", "stages=[importance]", "reinit.bias_compensation=true")
    place = world / f"two-{kind}"
    chosen = settings(world, run=f"two-{kind}", artifacts=place, **NO_SHAPE)
    pipeline(*chosen, *more, cwd=world, ranks=2)
    two = Scores.load(world / "runs" / f"two-{kind}" / "scores")
    near(two.heads, one.heads)
    near(two.neurons, one.neurons)


@pytest.mark.parametrize("policy", ["adaptive", "threshold"])
def test_layers_of_their_own_widths_keep_to_the_budget(world, policy):
    folders = made(
        world, f"plan.widths={policy}", "plan.clap=false", "plan.amplitude=0.2", "budget.parameters=0.6", CUT
    )
    teacher, start = (open_checkpoint(folders[name]).anatomy for name in ("teacher", "initial_student"))
    kept = start.parameters()[1] / teacher.parameters()[1]
    assert 0.5 < kept <= 0.6 and not start.sizes.uniform
    assert len(start.sizes.layers) == 4 and start.sizes.hidden == 32
    assert all(width.neurons % 16 == 0 and width.heads == width.groups for width in start.sizes.layers)
    shape = json.loads((folders["shape"] / "shape.json").read_text())
    assert shape["layers"] == 4 and shape["hidden"] == 32 and shape["neurons"] < 128
    if policy == "adaptive":
        influence = scored(folders).layers
        neurons = torch.tensor([width.neurons for width in start.sizes.layers])
        assert neurons[influence.argmax()] == neurons.max() and neurons[influence.argmin()] == neurons.min()
        sparsities = json.loads((folders["blueprint"] / "sparsities.json").read_text())["layers"]
        assert sum(sparsities) / 4 == pytest.approx(0.4, abs=0.02)


def test_a_given_shape_says_how_many_weights_its_layers_share(world):
    given = {"shape__layers": 3, "shape__hidden": 24, "shape__neurons": 96, "shape__groups": 3, "shape__heads": 3}
    chosen = ("plan.widths=threshold", "score.kind=fluctuation", CUT)
    equal, own = (
        open_checkpoint(made(world, *which, **given)["initial_student"]).anatomy for which in ((CUT,), chosen)
    )
    assert own.sizes.hidden == 24 and len(own.sizes.layers) == 3 and not own.sizes.uniform
    assert 0.9 * equal.parameters()[1] < own.parameters()[1] <= equal.parameters()[1]


@pytest.fixture(scope="module")
def unequal(world):
    """A student whose layers differ, to begin with as any teacher."""
    folder = made(world, "plan.widths=threshold", "plan.clap=false", "budget.parameters=0.7", CUT)["initial_student"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((world / "model" / file).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        ([], {"layers": 3}),
        (["plan.clap=false"], {"layers": 3, "neurons": 88}),
        ([*SEQUENCE, "restore.sequential=true", "reinit.slnp=false"], {"layers": 3, "neurons": 88}),
        (TYR, {"neurons": 88}),
    ],
)
def test_what_a_shape_leaves_out_each_layer_keeps_as_its_own(world, unequal, overrides, shape):
    given = {f"shape__{axis}": width for axis, width in shape.items()}
    folders = made(world, CUT, *overrides, model__path=unequal, **given)
    teacher, start = (open_checkpoint(folders[name]).anatomy.sizes for name in ("teacher", "initial_student"))
    hosts = [plan.host for plan in Blueprint.load(folders["blueprint"]).layers]
    most = shape.get("neurons", 128)
    own = [teacher.layers[host] for host in hosts]
    assert min(each.neurons for each in own) < 88 < max(each.neurons for each in own)
    assert start.layers == tuple(LayerSizes(each.heads, each.groups, min(each.neurons, most)) for each in own)


@pytest.mark.parametrize("axes", ["all", "layers", "neurons"])
def test_a_budget_is_of_what_a_teacher_of_unequal_layers_really_has(world, unequal, axes):
    folders = made(world, f"budget.axes={axes}", "budget.parameters=0.7", CUT, model__path=unequal)
    teacher, start = (open_checkpoint(folders[name]).anatomy.parameters()[1] for name in ("teacher", "initial_student"))
    assert 0.4 < start / teacher <= 0.7005


def test_no_speed_is_asked_of_a_teacher_of_unequal_layers(world, unequal):
    for requested in ("budget.speedup=1.5", "recipe.shape=search"):
        with pytest.raises(ValueError, match="the chip model takes all to be alike"):
            runner.check(configured(*settings(world, model__path=unequal, **NO_SHAPE), requested))


def test_compensating_biases_bring_the_cut_model_nearer_on_average(world):
    """The same cut with and without: the mean hidden state after the first layer is nearer to the teacher's."""
    chosen = ("recipe=flap", "budget.parameters=0.6", CUT)
    folders = made(world, *chosen)
    bare = made(world, *chosen, "reinit.bias_compensation=false")
    assert Blueprint.load(folders["blueprint"]) == Blueprint.load(bare["blueprint"])
    assert (
        open_checkpoint(folders["initial_student"]).config["mlp_bias"]
        and "mlp_bias" in open_checkpoint(bare["initial_student"]).config
    )
    batches = beginning(Packed(folders["tokens"] / "calibration"), 1024, 8, 0, 1, 0)

    def mean(folder):
        model = load_model(folder, torch.float32, "eager").model
        with torch.no_grad():
            states = [model(input_ids=ids, output_hidden_states=True).hidden_states[1] for ids in batches]
        return torch.cat(states).flatten(0, 1).mean(0)

    wanted = mean(folders["teacher"])
    assert (mean(folders["initial_student"]) - wanted).norm() < 0.5 * (mean(bare["initial_student"]) - wanted).norm()


def test_a_family_without_biases_is_refused_before_it_is_scored(tmp_path):
    world = make_world(tmp_path, "mistral")
    with pytest.raises(ValueError, match="no self_attn.o_proj.bias or mlp.down_proj.bias to put mean outputs into"):
        made(world, "recipe=flap", CUT)
    assert not list((world / "artifacts").glob("importance-*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.widths=adaptive", "plan.amplitude=0.3"], r"plan\.amplitude: 0\.3 .*0\.25"),
        (["recipe=adapt_pruner", "recipe.rounds=16"], "more than the step 0.01562"),
        (["shape.layers=2", "budget.parameters=0.5"], r"shape: .*budget\.\* .*parameters"),
        (["plan.widths=threshold", "budget.speedup=1.5"], r"plan\.widths: .*budget\.parameters"),
        (["plan.widths=threshold", "budget.axes=layers"], "makes all layers alike, and plan.widths=threshold does not"),
        (["plan.widths=adaptive", "budget.axes=neurons"], "makes all layers alike, and plan.widths=adaptive does not"),
        (["recipe=adapt_pruner", "recipe.repeat=[plan,cut]"], "plan needs a new result of importance, shape"),
        (["recipe=adapt_pruner", "recipe.repeat=[importance,shape,plan]"], "recipe.repeat: cut"),
        (["recipe=adapt_pruner", "recipe.repeat=[importance,shape,plan,cut,melt]"], r"recipe\.repeat: melt "),
        (["rotate.kind=principal", "plan.channels=leading", "recipe.rounds=2"], "set rotate.kind=none"),
        (["recipe.shape=search", "recipe.rounds=2"], "set recipe.shape=given"),
        (["recipe=adapt_pruner", "distill.tokens=384"], r"distill\.tokens: 384 .*recipe\.rounds"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_before_any_work(overrides, message):
    with pytest.raises(ValueError, match=message):
        runner.check(configured(*overrides))


def test_flap_runs_to_its_report_without_recovery(world):
    said = pipeline("recipe=flap", "run=flap", *settings(world, **NO_SHAPE, budget__parameters=0.6), cwd=world).stdout
    view = world / "runs" / "flap"
    report = json.loads((view / "report.json").read_text())
    assert report["recovery"] is None and "distill" not in report["stages"] and "report:" in said
    student = open_checkpoint(view / "student")
    assert "model.layers.0.mlp.down_proj.bias" in student
    kept = report["non_embedding_parameters"]
    assert kept["student"] <= 0.62 * kept["teacher"]  # biases come on top


def test_ffns_of_layers_that_differ_learn_each_at_its_width(world):
    chosen = ["plan.widths=threshold", "budget.parameters=0.7", "plan.clap=false", "local_distill.epochs=4"]
    chosen += ["local_distill.tokens=2048", "local_distill.batch_tokens=64", "local_distill.learning_rate=0.03"]
    folders = made(world, *chosen, "stages=[importance,shape,plan,cut,local_distill]")
    errors = LayerErrors.load(folders["initial_student"]).layers
    start = open_checkpoint(folders["initial_student"])
    assert len({layer.neurons for layer in start.anatomy.sizes.layers}) > 1
    assert len(errors) == 4 and all(each.after < each.before for each in errors)
    logits = load_model(folders["initial_student"], torch.float32, "eager")(torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all()
