"""Budgets of mixtures of experts are exact, and what does not count experts refuses them."""

import json
from dataclasses import replace
from itertools import combinations

import pytest

from pipeline import runner
from pipeline.costmodel.expert_budget import experts_for, possible_counts, with_experts
from pipeline.costmodel.shapes import Grid, ModelShape, multiples_for
from pipeline.costmodel.size_budget import Unit, sizes
from pipeline.model.anatomy import anatomy_of
from pipeline.model.shape import Shape
from pipeline.model.sizes import LayerSizes
from tests.mixtures import MIXTURES
from tests.tiny import config_of, tensors_of, tiny_model
from tests.tiny_text import configured
from tests.world import make_world, settings


def anatomy(kind):
    model = tiny_model(kind)
    return anatomy_of(config_of(model), tensors_of(model))


def shaped(world, *overrides):
    given = settings(world, run="unit", shape__layers=None, shape__neurons=None)
    return runner.run(configured(*given, "stages=[shape]", *overrides), "a test")


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3-groups", "gpt_oss"])
@pytest.mark.parametrize("budget, unit", [("parameters", Unit()), ("total", Unit()), ("bytes", Unit(2, 100))])
def test_the_most_experts_within_a_budget_stay(kind, budget, unit):
    of = anatomy(kind)

    def size(count):
        whole, inner = with_experts(of, count).parameters()
        if budget == "bytes":
            return 2 * whole + 100 * sum(layer.groups for layer in of.sizes.layers)
        return inner / of.parameters()[1] if budget == "parameters" else whole / of.parameters()[0]

    counts = possible_counts(of)
    for fewer, count in zip(counts, counts[1:]):
        kept, made = experts_for(of, budget, size(count), unit, of)
        assert kept == count and made.reached == pytest.approx(size(count))
        assert experts_for(of, budget, size(count) * (1 - 1e-9), unit, of)[0] == fewer
    with pytest.raises(ValueError, match=rf"^budget\.{budget}: "):
        experts_for(of, budget, size(counts[0]) * 0.99, unit, of)


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_parameters_that_a_token_uses_are_counted_exactly_for_every_shape(kind):
    of = anatomy(kind)
    grid = Grid(ModelShape.of(of), multiples_for(ModelShape.of(of)))
    found = sizes(of, grid, Unit(active=True))
    hidden, pair, neurons = len(grid.hidden) - 1, len(grid.attention) - 1, len(grid.neurons) - 1
    heads, groups = grid.attention[pair].tolist()
    whole = of.narrowed(of.sizes, of.layer_types).active_parameters()[0]
    assert (of.sizes.layers[0].heads, of.sizes.layers[0].groups) == (heads, groups)
    assert found[-1, hidden, pair, neurons] == whole
    students = []
    for hosts in combinations(range(len(of.sizes.layers)), int(grid.layers[0])):
        few = of.sizes.of_layers(hosts, (of.sizes.layers[host] for host in hosts))
        students.append(of.narrowed(few, tuple(of.layer_types[host] for host in hosts)))
    assert found[0, hidden, pair, neurons] == max(each.active_parameters()[0] for each in students)
    assert isinstance(of.sizes.layers[0], LayerSizes)


def test_budgets_through_the_stage(tmp_path):
    world = make_world(tmp_path, "mixtral")
    folders = shaped(world, "budget.axes=experts", "budget.parameters=0.8")
    shape, of = json.loads((folders["shape"] / "shape.json").read_text()), anatomy("mixtral")
    assert with_experts(of, shape["experts"]).parameters()[1] <= 0.8 * of.parameters()[1]
    assert with_experts(of, shape["experts"] + 1).parameters()[1] > 0.8 * of.parameters()[1]
    folders = shaped(world, "budget.axes=layers", "budget.active_parameters=0.8")
    shape = json.loads((folders["shape"] / "shape.json").read_text())
    assert (shape["layers"], shape["experts"]) == (3, None)


@pytest.mark.parametrize(
    "setting, overrides",
    [
        ("plan.widths=adaptive", ["budget.parameters=0.8", "plan.widths=adaptive"]),
        ("model.path", ["budget.speedup=1.1"]),
        ("budget.active_parameters", ["budget.active_parameters=0.8", "budget.axes=experts"]),
        ("dry_run", ["shape.experts=2", "dry_run=true", "stages=null"]),
    ],
)
def test_low_rank_attention_is_refused_where_the_chip_model_counts(setting, overrides, tmp_path):
    with pytest.raises(ValueError, match=f"^{setting}"):
        shaped(make_world(tmp_path, "deepseek_v3"), *overrides)


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_5_text", "gemma4_text", "kimi_linear"])
@pytest.mark.parametrize("axes", ["all", "layers"])
def test_parameters_of_attention_that_is_kept_whole_are_counted_exactly(kind, axes, tmp_path):
    whole = anatomy(kind)
    needed = "plan.keep_first=3" if kind == "qwen3_5_text" else "plan.keep_first=1"  # attention, from layer 2 on
    made = shaped(make_world(tmp_path, kind), f"budget.axes={axes}", "budget.parameters=0.9", needed)
    budget, shape = json.loads((made["shape"] / "budget.json").read_text()), Shape.load(made["shape"])
    assert shape.heads == whole.sizes.layers[0].heads and budget["reached"] <= 0.9
    narrow = [shape.widest.within(widths) for widths in whole.sizes.layers]
    largest = 0
    for hosts in combinations(range(len(narrow)), shape.layers):
        sizes = replace(whole.sizes.of_layers(hosts, (narrow[host] for host in hosts)), hidden=shape.hidden)
        student = whole.narrowed(sizes, tuple(whole.layer_types[host] for host in hosts))
        largest = max(largest, student.parameters()[1])
    assert budget["reached"] == pytest.approx(largest / whole.parameters()[1])


@pytest.mark.parametrize("axes", ["all", "layers", "experts"])
def test_parameters_of_a_mixture_keep_to_their_budget(axes, tmp_path):
    world, of = make_world(tmp_path, "mixtral"), anatomy("mixtral")
    folders = shaped(world, f"budget.axes={axes}", "budget.parameters=0.7")
    budget = json.loads((folders["shape"] / "budget.json").read_text())
    shape = Shape.load(folders["shape"])
    assert budget["reached"] <= 0.7 and (shape.experts is None) == (axes != "experts")
    made = with_experts(of, shape.experts or 4)
    widths = LayerSizes(shape.heads, shape.groups, shape.neurons)
    sizes = replace(made.sizes, hidden=shape.hidden, layers=(widths,) * shape.layers)
    kept = made.narrowed(sizes, made.layer_types[: shape.layers]).parameters()[1]
    assert kept / of.parameters()[1] == pytest.approx(budget["reached"])


def test_a_speedup_of_experts_alone_passes_through_the_stage(tmp_path):
    world = make_world(tmp_path, "mixtral")
    chosen = ["budget.axes=experts", "budget.speedup=1.0", "device/chip=CPU"]
    assert Shape.load(shaped(world, *chosen)["shape"]).experts == 4
    with pytest.raises(ValueError, match=r"^budget\.speedup: "):
        shaped(world, *chosen[:1], "budget.speedup=9", "device/chip=CPU")
    with pytest.raises(ValueError, match=r"^budget\.axes: "):
        shaped(world, *chosen, "budget.memory_gb=1")


@pytest.mark.parametrize("kind", ["mixtral", "dots1"])
def test_a_dry_run_answers_for_a_mixture(kind, tmp_path, capsys):
    shaped(make_world(tmp_path, kind), "shape.experts=2", "dry_run=true", "stages=null", "device/chip=CPU")
    assert "recovery needs 1 x " in capsys.readouterr().out


def test_a_dense_model_has_no_budget_of_experts(tmp_path):
    with pytest.raises(ValueError, match=r"^budget\.axes: "):
        shaped(make_world(tmp_path, "llama"), "budget.axes=experts", "budget.parameters=0.8")
