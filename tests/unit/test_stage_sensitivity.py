"""plan.widths=measured: masks that equal cuts, a model left as it was, budgets kept through the real stages."""

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from pipeline import runner
from pipeline.allocate.curves import Sensitivities
from pipeline.data.packing import Packed
from pipeline.data.stream import beginning
from pipeline.evaluation.divergence import divergence, final_states
from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, everything
from pipeline.model.causal import decoder_of
from pipeline.model.hf_config import student_config
from pipeline.model.scores import Scores
from pipeline.model.shape import Depth
from pipeline.prune.importance.measure import measure
from pipeline.prune.passes.prefix import PrefixCache
from pipeline.prune.second_order.mask import masked, without
from pipeline.prune.second_order.restore import restore
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint import open_checkpoint, open_tensors
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from pipeline.stages.analyse import sensitivity
from tests.tiny import config_of, tensors_of, tiny_model, tokens
from tests.tiny_text import configured
from tests.watching import calls_of, counted, watched
from tests.world import make_world, pipeline, settings

WIDE = {"num_key_value_heads": 4, "intermediate_size": 128}  # eight multiples of neurons, four groups
NO_SHAPE = {"shape__layers": None, "shape__neurons": None}
CHOSEN = ("plan.widths=measured", "plan.depth_tokens=256", "plan.clap=false", "sensitivity.levels=[0.5,1.0]")
CUT = "stages=[importance,shape,layer_loss,hessian,obs_order,sensitivity,plan,cut]"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("measured"), **WIDE)


def made(world, *overrides, **values):
    chosen = settings(world, run="unit", **(NO_SHAPE | values))
    return runner.run(configured(*chosen, *CHOSEN, CUT, *overrides), "a test")


def rows_of(folders):
    return Sensitivities.load(folders["sensitivities"]).rows


@pytest.mark.parametrize("kind", ["llama-biases", "gemma3_text", "glm4", "olmo2", "phi3"])
def test_masking_equals_cutting_and_leaves_every_weight_as_it_was(kind, tmp_path):
    model = tiny_model(kind)
    config, source = config_of(model), tensors_of(model)
    before = {name: tensor.clone() for name, tensor in source.items()}
    anatomy = anatomy_of(config, source)
    scores = measure(decoder_of(model), anatomy, [tokens()]).scores()
    plans = tuple(without(anatomy, scores, layer, 1, 8) for layer in range(4))
    blueprint = replace(everything(anatomy.sizes), layers=plans)
    write_checkpoint(tmp_path, student_config(config, anatomy, blueprint), cut(anatomy, blueprint, source), 1e9)
    with torch.no_grad():
        dense = model(tokens()).logits
        with ExitStack() as masks:
            for plan in plans:
                masks.enter_context(masked(model, anatomy, plan))
            narrow = model(tokens()).logits
        wanted = load_model(tmp_path, torch.float64, "eager")(tokens()).logits
    assert (narrow - wanted).norm() / wanted.norm() < 1e-5  # the classes compute some parts in float32
    assert (narrow - dense).norm() / dense.norm() > 1e-2
    with pytest.raises(RuntimeError, match="halfway"), masked(model, anatomy, plans[0]):
        raise RuntimeError("halfway")
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("restored", "length"), [(False, 999), (True, 8)])
def test_measured_widths_keep_to_the_budget_and_rows_are_the_kl_of_what_would_be_cut(restored, length, world):
    seen, runs = [], Counter()

    def remember(given):
        model = counted(given["model"], runs)
        seen.append((model, {name: tensor.clone() for name, tensor in model.state_dict().items()}))

    chosen = ("budget.parameters=0.6", f"restore.outputs={restored}".lower(), f"sensitivity.length={length}")
    with watched({PrefixCache.__init__: remember}):
        folders = made(world, *chosen)
    ((model, before),) = seen
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    teacher, start = (open_checkpoint(folders[name]).anatomy for name in ("teacher", "initial_student"))
    kept = start.parameters()[1] / teacher.parameters()[1]
    assert 0.55 < kept <= 0.6 and len(start.sizes.layers) == 4 and start.sizes.hidden == 32
    assert all(width.neurons % 16 == 0 and width.heads == width.groups for width in start.sizes.layers)
    rows = rows_of(folders)
    assert (rows[0].layer, rows[0].kind, rows[0].removed, rows[0].loss) == (None, None, 0, pytest.approx(0.0, abs=1e-6))
    assert [(row.kind, row.removed) for row in rows if row.layer == 2] == [
        ("groups", 2), ("groups", 3), ("neurons", 64), ("neurons", 128)
    ]  # fmt: skip
    row = next(row for row in rows if (row.layer, row.kind, row.removed) == (2, "neurons", 64))
    stays = Scores.load(folders["scores"]).neurons[2].argsort()[64:]
    dense = load_model(folders["teacher"], torch.float64, "eager")
    cut_ = load_model(folders["teacher"], torch.float64, "eager")
    down, name = cut_.model.layers[2].mlp.down_proj.weight.data, "model.layers.2.mlp.down_proj"
    left = restore(down, open_tensors(folders["hessians"])[name], stays) if restored else down[:, stays]
    down.zero_()[:, stays] = left
    text = Packed(folders["tokens"] / "calibration")
    read = min(length, text.sequence)
    batches = [ids[:, :read] for ids in beginning(text, 256 // read * text.sequence, 8, 0, 1, 0)]
    assert sum(ids.numel() for ids in batches) == 256
    # final states, nothing removed, four narrowings of the layer and of each below, and once to get behind it
    assert runs == {layer: len(batches) * (2 + 4 * (layer + 1) + (layer < 3)) for layer in range(4)}
    sums = sum(divergence(cut_, ids, final_states(dense, ids), 64) for ids in batches)
    assert row.loss == pytest.approx(float(sums[0] / sums[1]), rel=5e-2)  # layers compute in bf16 here


def test_groups_stay_where_the_budget_narrows_the_ffn_alone(world):
    folders = made(world, "budget.parameters=0.8", "budget.axes=neurons")
    assert {row.kind for row in rows_of(folders)} == {None, "neurons"}
    teacher, start = (open_checkpoint(folders[name]).anatomy for name in ("teacher", "initial_student"))
    assert [(each.heads, each.groups) for each in start.sizes.layers] == [(4, 4)] * 4
    assert 0.75 < start.parameters()[1] / teacher.parameters()[1] <= 0.8
    assert len({each.neurons for each in start.sizes.layers}) > 1 and start.sizes.hidden == 32


def test_a_layer_that_writes_nothing_loses_first(tmp_path):
    world = make_world(tmp_path, **WIDE)
    source = open_checkpoint(world / "model")
    silent = "model.layers.1.mlp.down_proj.weight"
    stream = [(name, source[name] * (name != silent)) for name in source]
    silenced = {name: tensor.clone() for name, tensor in stream}
    write_checkpoint(world / "silent", source.config, iter(silenced.items()), 1e9, world / "model")
    folders = made(world, "budget.parameters=0.8", model__path=world / "silent")
    widths = [len(plan.neurons) for plan in Blueprint.load(folders["blueprint"]).layers]
    assert widths[1] == 16 and min(widths[0], *widths[2:]) > 16


def test_what_an_interrupted_measuring_wrote_is_not_measured_again(world):
    chosen = (f"artifacts={world / 'again'}", "calibration.batch_size=4")
    with pytest.raises(KeyboardInterrupt), calls_of(divergence, KeyboardInterrupt(), at=30) as calls:
        made(world, *chosen)
    with calls_of(divergence) as more:
        rows = rows_of(made(world, *chosen))
    assert len(rows) == 17 and len(calls + more) == 17 * 2 + 2, "two batches a row; only the broken row comes twice"


def test_the_order_of_removal_says_what_is_masked_and_dropped_layers_are_not_measured(world):
    chosen = ("restore.order=obs", "plan.depth=loss", CUT)
    given = {"shape__layers": 3, "shape__neurons": 96, "shape__groups": 3, "shape__heads": 3}
    folders = made(world, *chosen, **given)
    manifest = json.loads((folders["sensitivities"] / "manifest.json").read_text())
    assert {"obs_orders", "depth", "scores", "shape"} <= set(manifest["inputs"])
    kept = list(Depth.load(folders["depth"]).kept)
    rows = rows_of(folders)
    assert [row.layer for row in rows[1::4]] == kept and rows[0].loss > 0
    own = open_checkpoint(folders["initial_student"]).anatomy
    even = open_checkpoint(made(world, "plan.widths=uniform", *chosen, **given)["initial_student"]).anatomy
    assert 0.9 * even.parameters()[1] < own.parameters()[1] <= even.parameters()[1]


def test_two_ranks_measure_what_one_measures(world):
    one = rows_of(made(world, "calibration.batch_size=8"))
    chosen = settings(world, run="two", artifacts=world / "two", **NO_SHAPE)
    pipeline(*chosen, *CHOSEN, CUT, "calibration.batch_size=4", cwd=world, ranks=2)
    two = Sensitivities.load(world / "runs" / "two").rows
    for here, there in zip(one, two, strict=True):
        assert here.removed == there.removed and here.loss == pytest.approx(there.loss, rel=5e-2, abs=1e-4)


def test_the_line_runs_to_its_report_in_two_rounds(world):
    """Each round measures the student of the one before."""
    chosen = settings(world, **NO_SHAPE, run="rounds", recipe__rounds=2)
    repeat = "importance,shape,sensitivity,plan,cut"
    line_ = (f"recipe.stages=[{repeat},export,evaluate,report]", f"recipe.repeat=[{repeat}]")
    pipeline(*chosen, *CHOSEN, *line_, cwd=world)
    view = world / "runs" / "rounds"
    first, second = (Sensitivities.load(view / place).rows for place in ("rounds/1", "."))
    assert len(first) == 17 and first != second and second[0].loss == pytest.approx(0.0, abs=1e-6)
    report = json.loads((view / "report.json").read_text())
    kept = report["non_embedding_parameters"]
    assert 0.7 < kept["student"] / kept["teacher"] <= 0.75 and "sensitivity" in report["stages"]
    assert open_checkpoint(view / "student").anatomy.sizes.hidden == 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget.axes=layers"], r"^budget\.axes: layers .*plan\.widths=measured"),
        (["budget.speedup=1.5"], r"^plan\.widths: measured .*speedup"),
        (["recipe=flap", "plan.widths=measured"], r"^recipe\.stages: .*sensitivity"),
        (["sensitivity.levels=[0.5,1.5]"], r"^sensitivity\.levels"),
        (["sensitivity.levels=[]"], r"^sensitivity\.levels"),
        (["restore.sequential=true"], r"^restore\.sequential: .*plan\.widths=measured"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_before_any_work(overrides, message):
    with pytest.raises(ValueError, match=message):
        runner.check(configured(*CHOSEN, *overrides))


def test_other_widths_need_no_sensitivities():
    assert not sensitivity.enabled(configured()) and not sensitivity.enabled(configured("recipe=best"))
