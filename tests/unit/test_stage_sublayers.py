"""Removal of attentions and FFNs: what is measured is the student that is cut, and each choice is the least."""

import json
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import runner
from pipeline.allocate.sublayers import greedy_sublayers
from pipeline.data.packing import Packed
from pipeline.data.stream import beginning
from pipeline.distill.layer_errors import LayerErrors
from pipeline.evaluation.divergence import divergence, final_states
from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, everything
from pipeline.model.hf_config import student_config
from pipeline.model.shape import Removal, Sublayers
from pipeline.prune.passes.prefix import PrefixCache
from pipeline.prune.passes.sublayers import without_sublayers
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.device import open_device
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_model
from pipeline.runtime.tracker import Track
from pipeline.stages.analyse import sublayers
from pipeline.stages.models import load
from pipeline.stages.sublayer_target import target_of
from tests.processes import on_ranks
from tests.students import imported, machine
from tests.tiny import config_of, save_tiny, tensors_of, tiny_model, tokens
from tests.tiny_text import configured
from tests.watching import calls_of, counted
from tests.world import make_world, settings

WHOLE = {"shape__layers": None, "shape__neurons": None}
CHOSEN = ("plan.depth_tokens=256", "plan.clap=false", "sublayers.candidates=null")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("sublayers"), "llama-tied")


def made(world, *overrides, stages="importance,shape,sublayers,plan,cut"):
    chosen = settings(world, run="unit", **WHOLE)
    return runner.run(configured(*chosen, *CHOSEN, f"stages=[{stages}]", *overrides), "a test")


@pytest.mark.parametrize(
    "kind", ["llama-biases", "gemma3_text", "glm4", "olmo2", "phi3", "granite", "stablelm-parallel"]
)
def test_a_pass_without_sublayers_is_that_of_the_student_that_is_cut(kind, tmp_path):
    model = tiny_model(kind)
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    whole = everything(anatomy.sizes)
    removed = ((1, "attention_layers"), (2, "ffn_layers"), (3, "attention_layers"))
    plans = [
        replace(plan, groups=()) if layer in (1, 3) else replace(plan, neurons=()) if layer == 2 else plan
        for layer, plan in enumerate(whole.layers)
    ]
    blueprint = Blueprint(whole.channels, tuple(plans))
    source = dict(cut(anatomy, blueprint, tensors_of(model)))
    write_checkpoint(tmp_path, student_config(config_of(model), anatomy, blueprint), source.items(), 1e9)
    student = load_model(tmp_path, torch.float64, "eager")
    with torch.no_grad():
        wanted = student(tokens()).logits
        with without_sublayers(model, anatomy, removed):
            found = model(tokens()).logits
    assert (found - wanted).norm() / wanted.norm() < 1e-6


def test_a_pass_that_begins_above_removed_sublayers_gives_the_numbers_of_a_whole_one():
    model = tiny_model("llama")
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    prefix, count = PrefixCache(model, anatomy, [tokens()]), Counter()
    counted(model, count)
    with without_sublayers(model, anatomy, [(0, "ffn_layers")]):
        with without_sublayers(model, anatomy, [(3, "attention_layers")]):
            wanted = final_states(model, tokens())
            count.clear()
        prefix.reach([0, 1, 2])
        with without_sublayers(model, anatomy, [(3, "attention_layers")]), prefix.rest(0, [0, 1, 2, 3]):
            assert torch.equal(final_states(model, tokens()), wanted)
    assert count == {0: 1, 1: 1, 2: 1, 3: 1}


def test_the_student_has_the_divergence_that_was_measured_and_the_numbers_requested(world):
    folders = made(world, "shape.attention_layers=2", "shape.ffn_layers=3")
    found = Sublayers.load(folders["sublayers"])
    blueprint = Blueprint.load(folders["blueprint"])
    assert sum(bool(plan.groups) for plan in blueprint.layers) == 2
    assert sum(bool(plan.neurons) for plan in blueprint.layers) == 3
    assert {each.layer for each in found.removed} <= {1, 2, 3}  # plan.keep_first
    teacher, student = (load_model(folders[name], torch.float32, "eager") for name in ("teacher", "initial_student"))
    sums = torch.zeros(2, dtype=torch.float64)
    for ids in beginning(Packed(folders["tokens"] / "calibration"), 256, 8, 0, 1, 0):
        sums += divergence(student, ids, final_states(teacher, ids), 64)
    assert float(sums[0] / sums[1]) == pytest.approx(found.removed[-1].divergence, rel=3e-2)


@pytest.mark.parametrize("candidates", ["null", 1])
def test_every_divergence_is_that_of_a_whole_pass(world, candidates):
    folders = made(world, "budget.axes=sublayers", "budget.parameters=0.4", f"sublayers.candidates={candidates}")
    found = Sublayers.load(folders["sublayers"]).removed
    model, anatomy = load(folders["teacher"], machine()), open_checkpoint(folders["teacher"]).anatomy
    batches = list(beginning(Packed(folders["tokens"] / "calibration"), 256, 8, 0, 1, 0))
    wanted = [final_states(model, ids) for ids in batches]
    for count, each in enumerate(found, 1):
        with without_sublayers(model, anatomy, [(part.layer, part.sublayer) for part in found[:count]]):
            sums = sum(divergence(model, ids, states, 64) for ids, states in zip(batches, wanted, strict=True))
        assert float(sums[0] / sums[1]) == pytest.approx(each.divergence, rel=1e-6)


def test_a_removed_attention_frees_its_cache_and_its_parameters(world):
    folders = made(world, "shape.attention_layers=2")
    teacher, student = (open_checkpoint(folders[name]).anatomy for name in ("teacher", "initial_student"))
    attention = 32 * (32 + 16 + 16 + 32) + 32
    assert teacher.parameters()[0] - student.parameters()[0] == 2 * attention
    assert sum(w.groups for w in student.sizes.layers) == sum(w.groups for w in teacher.sizes.layers) // 2


@pytest.mark.parametrize("budget", ["parameters=0.7", "total=0.8", "bytes=80000", "bytes=100000 budget.context=64"])
def test_a_budget_is_kept_and_one_removal_less_would_not(world, budget):
    config = configured(*settings(world, **WHOLE), "budget.axes=sublayers", *f"budget.{budget}".split())
    folders = made(world, "budget.axes=sublayers", *f"budget.{budget}".split())
    found = Sublayers.load(folders["sublayers"])
    target = target_of(config, open_checkpoint(folders["teacher"]).anatomy, found.hosts)
    removed = tuple((each.layer, each.sublayer) for each in found.removed)
    assert target.enough(removed)
    assert not any(target.enough(tuple(each for each in removed if each != part)) for part in removed)
    student = open_checkpoint(folders["initial_student"])
    parameters = student.anatomy.parameters()
    if "context" in budget:
        cached = sum(w.groups for w in student.anatomy.sizes.layers) * 64 * 2 * 8 * 4
        assert target.size(removed) == parameters[0] * 4 + cached <= 100000
    elif "bytes" in budget:
        assert target.size(removed) == parameters[0] * 4 <= 80000
    else:
        assert target.size(removed) == parameters["parameters" in budget]


COSTS = {(layer, axis): (layer + 1) * (1.0 if axis == "a" else 2.5) for layer in range(4) for axis in "ab"}


def chosen_by(candidates, size, count=5):
    """Remove from a model whose divergence is that of its parts, more for two of one layer; count what is measured."""
    calls = []

    def measured(removed, part):
        gone = (*removed, part) if part else removed
        calls.append(gone)
        both = sum((layer, "a") in gone and (layer, "b") in gone for layer in range(4))
        return sum(COSTS[each] for each in gone) + 10.0 * both

    found = greedy_sublayers(
        list(COSTS),
        measured,
        allowed=lambda removed, part: part[0] > 0,
        enough=lambda removed: len(removed) == count,
        size=size,
        candidates=candidates,
    )
    return found, len(calls)


def test_each_removal_is_the_one_of_least_divergence_given_those_before():
    found, calls = chosen_by(None, None)
    removed = [(each.layer, each.sublayer) for each in found]
    assert removed == [(1, "a"), (2, "a"), (3, "a"), (1, "b"), (2, "b")]
    assert [each.divergence for each in found] == [2, 5, 9, 24, 41.5] and calls == 1 + 6 + 5 + 4 + 3 + 2


def test_with_sizes_the_rise_over_what_is_freed_decides():
    weights = {"a": 1.0, "b": 8.0}
    found, _ = chosen_by(None, lambda removed: -sum(weights[axis] for _, axis in removed), 3)
    assert [(each.layer, each.sublayer) for each in found] == [(1, "b"), (2, "b"), (3, "b")]


def test_few_candidates_measure_less_and_choose_the_same_where_scores_only_rise():
    whole, calls = chosen_by(None, None)
    few, fewer = chosen_by(2, None)
    assert few == whole and fewer == 1 + 6 + 2 + 2 + 3 + 2 < calls


def test_what_a_later_removal_makes_unnecessary_stays():
    weights = {"a": 1.0, "b": 8.0}

    def size(removed):
        return 36.0 - sum(weights[axis] for _, axis in removed)

    def measured(removed, part):
        return sum(0.1 if axis == "a" else layer + 1.0 for layer, axis in ((*removed, part) if part else removed))

    options = {"allowed": lambda removed, part: True, "candidates": None}
    found = greedy_sublayers(list(COSTS), measured, enough=lambda removed: size(removed) <= 27.0, size=size, **options)
    assert [(each.layer, each.sublayer, each.divergence) for each in found] == [(0, "a", 0.1), (0, "b", 1.1)]


def test_more_than_may_be_removed_is_refused():
    with pytest.raises(ValueError, match="no attention or FFN may be removed after 6 of them"):
        chosen_by(None, None, 7)


@pytest.mark.parametrize(
    "kind, overrides, fault",
    [
        ("llama", ["shape.attention_layers=5"], "shape.attention_layers: 5 is outside 1..4"),
        ("llama", ["shape.layers=3", "shape.ffn_layers=4"], "shape.ffn_layers: 4 is outside 1..3"),
        (
            "opt",
            ["shape.ffn_layers=2"],
            "shape.ffn_layers: model_type 'opt' keeps its ffn_layers: a layer of it has no",
        ),
        (
            "bloom",
            ["shape.attention_layers=2"],
            "shape.attention_layers: model_type 'bloom' keeps its attention_layers",
        ),
        ("llama", ["budget.axes=sublayers", "budget.parameters=0.1"], "budget.parameters: 0.1 cannot be reached"),
    ],
)
def test_what_no_student_has_is_refused_before_any_work(kind, overrides, fault, tmp_path):
    save_tiny(tiny_model(kind), tmp_path)
    with pytest.raises(ValueError, match=fault):
        sublayers.check(configured(f"model.path={tmp_path}", *overrides))


def attempt(ranks, place, stop, *inputs):
    """Run the stage into a folder, to its end or to the beginning of a measurement; return how many were begun."""
    given = dict(zip(("subject", "teacher", "tokens", "scores", "shape"), map(Path, inputs), strict=True))
    Path(place).mkdir(exist_ok=True)
    here = Machine(open_device("cpu", "auto", False, ranks.local_rank, 0), ranks, Track())
    config = configured(
        *CHOSEN, "shape.attention_layers=2", "shape.ffn_layers=3", f"calibration.batch_size={8 // ranks.world}"
    )
    with suppress(KeyboardInterrupt), calls_of(divergence, KeyboardInterrupt(), stop) as measured:
        sublayers.run(config, given, Path(place), here)
    return len(measured)


def attempts(ranks, place, *inputs):
    straight = attempt(ranks, f"{place}/straight", 0, *inputs)
    return (
        straight,
        attempt(ranks, f"{place}/killed", straight - 2, *inputs),
        attempt(ranks, f"{place}/killed", 0, *inputs),
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_interrupted_choice_measures_nothing_twice_and_ends_the_same_on_several_ranks(world, tmp_path, world_size):
    folders = made(world, "shape.attention_layers=2", "shape.ffn_layers=3", stages="importance,shape")
    inputs = [str(folders[name].absolute()) for name in ("teacher", "teacher", "tokens", "scores", "shape")]
    result = on_ranks(attempts, tmp_path, world_size, arguments=(str(tmp_path), *inputs))
    straight = result[0][0]
    assert result == [[straight, straight - 2, 3]] * world_size
    whole, killed = (json.loads((tmp_path / name / Sublayers.FILE).read_text()) for name in ("straight", "killed"))
    assert whole == killed
    one = made(world, "shape.attention_layers=2", "shape.ffn_layers=3")["sublayers"]
    found, expected = Sublayers.load(tmp_path / "straight").removed, Sublayers.load(one).removed
    assert [replace(each, divergence=0.0) for each in found] == [replace(each, divergence=0.0) for each in expected]
    for each, wanted in zip(found, expected, strict=True):
        assert each.divergence == pytest.approx(wanted.divergence, rel=1e-4)


def test_a_layer_that_loses_both_is_removed_whole(tmp_path):
    anatomy = imported(save_tiny(tiny_model("llama"), tmp_path / "model"), tmp_path / "teacher").anatomy
    lost = Sublayers((0, 1, 2), (Removal(1, "ffn_layers", 0.1), Removal(1, "attention_layers", 0.2)))
    assert lost.without(1, anatomy.sizes.layers[1]) is None
    assert lost.without(2, anatomy.sizes.layers[2]) == anatomy.sizes.layers[2]


def test_a_whole_run_trains_the_ffns_that_are_left_recovers_and_reports_what_was_removed(world):
    changed = ["shape.attention_layers=2", "shape.ffn_layers=3", "local_distill.tokens=256", "local_distill.epochs=1"]
    chosen = settings(world, run="whole", evaluate__words=0, **WHOLE)
    quiet = ["evaluate.speed=false", "report.samples=0", "distill.loss.hidden=0.1", "export.form=own"]
    folders = runner.run(configured(*chosen, *CHOSEN, *changed, *quiet), "a test")
    blueprint = Blueprint.load(folders["blueprint"])
    trained = LayerErrors.load(folders["initial_student"]).layers
    assert [each.layer for each in trained] == [place for place, plan in enumerate(blueprint.layers) if plan.neurons]
    assert all(each.after <= each.before for each in trained)
    student = open_checkpoint(folders["student"])
    assert student.anatomy.sizes == blueprint.sizes(open_checkpoint(folders["teacher"]).anatomy.sizes)
    report = json.loads((world / "runs/whole/report.json").read_text())
    assert report["cut"]["removed_attention"] == [plan.host for plan in blueprint.layers if not plan.groups]
    assert report["cut"]["removed_ffn"] == [plan.host for plan in blueprint.layers if not plan.neurons]
    assert report["kv_bytes_per_token"]["student"] == report["kv_bytes_per_token"]["teacher"] // 2
    assert report["recovery"]["curves"]


def test_a_student_without_some_sublayers_can_be_pruned_again_but_not_by_methods_that_need_them(world):
    first = made(world, "shape.attention_layers=2", "shape.ffn_layers=3")
    model = f"model.path={first['initial_student'].absolute()}"
    chosen = configured(*settings(world, run="again", **WHOLE), *CHOSEN, model, "shape.neurons=16", "shape.layers=3")
    again = runner.run(chosen.model_copy(update={"stages": ["importance", "shape", "plan", "cut"]}), "a test")
    source, student = (open_checkpoint(folders["initial_student"]).anatomy for folders in (first, again))
    hosts = [plan.host for plan in Blueprint.load(again["blueprint"]).layers]
    wanted = [(source.sizes.layers[host].groups, min(16, source.sizes.layers[host].neurons)) for host in hosts]
    assert [(own.groups, own.neurons) for own in student.sizes.layers] == wanted
    for method in ("restore.outputs=true", "score.kind=fluctuation", "reinit.bypass=true"):
        with pytest.raises(ValueError, match=f"{method.partition('=')[0]}: needs attention and an FFN in every layer"):
            runner.check(configured(*settings(world, **WHOLE), *CHOSEN, model, method))
