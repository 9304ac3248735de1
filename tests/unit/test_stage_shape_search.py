"""The search stage: it measures what plan and cut make, on text nothing else was read from, and resumes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import estimate, runner
from pipeline.costmodel.pareto import Serving, describe, search, shape_within
from pipeline.costmodel.shapes import ModelShape
from pipeline.data.packing import Packed
from pipeline.data.stream import left_over, stream
from pipeline.evaluation.perplexity import tally
from pipeline.model.blueprint import Blueprint
from pipeline.model.hf_config import student_config, with_scales
from pipeline.model.scores import Scores
from pipeline.report.drawing import Dot
from pipeline.report.figures import shapes_searched
from pipeline.report.tables import search_table
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.device import open_device
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_model
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.tracker import Track
from pipeline.stages.analyse import importance
from pipeline.stages.build import cut
from pipeline.stages.choose import plan, shape, shape_search
from pipeline.stages.prepare import tokens
from pipeline.training_settings import steps_of
from tests.chips import chip
from tests.tiny_text import configured
from tests.watching import calls_of
from tests.world import make_world

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}


def machine() -> Machine:
    """The real machine, computing in float32 so that two ways to the same number agree."""
    device = replace(open_device("cpu", "auto", False, 0, 0), compute_dtype=torch.float32)
    return Machine(device, Ranks(0, 1, 0), Track())


def configure(folder: Path, *overrides: str):
    paths = [f"data.{use}.path={folder / use}.txt" for use in ("calibration", "recovery", "evaluation")]
    small = (
        "score.tokens=512",
        "shape_search.tokens=256",
        "shape_search.candidates=3",
        "recipe.shape=search",
        "device=cpu",
    )
    return configured(*paths, *small, *overrides)


def made_by(stage, config, inputs: dict[str, Path], out: Path) -> Path:
    out.mkdir(exist_ok=True)
    stage.run(config, inputs, out, machine())
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, its tokens and its scores."""
    folder = make_world(tmp_path_factory.mktemp("search"), **SMALL)
    return folder, scored(folder)


@pytest.fixture(scope="module")
def found(world):
    folder, made = world
    return made_by(shape_search, configure(folder), made, folder / "found")


def test_a_search_writes_the_shape_it_picked_and_how_it_was_found(found):
    result = json.loads((found / "search.json").read_text())
    picked = json.loads((found / "shape.json").read_text())
    axes = ["layers", "hidden", "heads", "groups", "neurons"]
    assert all(picked[axis] == result["picked"][axis] for axis in axes)
    losses = [each["loss"] for each in result["candidates"]]
    good = [each for each in result["candidates"] if each["loss"] <= min(losses) + 0.05]
    assert picked == max(good, key=lambda each: each["decode_rate"])["shape"]
    assert 2 <= len(losses) <= 3 and all(each["kept"] <= 0.75 for each in result["candidates"])
    assert (found / "pareto.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in found.iterdir()) == ["pareto.png", "search.json", "shape.json"]


def scored(folder: Path) -> dict[str, Path]:
    """Return a world's teacher, its tokens and its scores."""
    config, made = configure(folder), dict.fromkeys(("reference", "teacher", "subject"), folder / "model")
    made["tokens"] = made_by(tokens, config, made, folder / "tokens")
    return made | {"scores": made_by(importance, config, made, folder / "scores")}


def with_static_scales(folder: Path) -> Path:
    """Return a world whose teacher's post-norms are scales by now."""
    source = open_checkpoint(make_world(folder, "gemma2", **SMALL) / "model")
    result = {name: tensor.clone() for name, tensor in source.items()}
    write_checkpoint(folder / "scaled", with_scales(source.config, source.anatomy), result.items(), 1e9, source.folder)
    shutil.rmtree(folder / "model")
    (folder / "scaled").rename(folder / "model")
    return folder


@pytest.mark.parametrize("scales", [False, True])
def test_the_loss_of_the_picked_shape_is_that_of_what_plan_and_cut_make(world, found, tmp_path, scales):
    folder, made = world
    config = configure(folder)
    if scales:
        made = scored(folder := with_static_scales(tmp_path / "scales"))
        found = made_by(shape_search, config := configure(folder), made, tmp_path / "found")
        assert json.loads((found / "shape.json").read_text())["hidden"] < 64
    made = made | {"shape": found}
    made["blueprint"] = made_by(plan, config, made, tmp_path / "blueprint")
    start = made_by(cut, config, made, tmp_path / "start")
    if scales:
        channels = list(Blueprint.load(made["blueprint"]).channels)
        norm = "model.layers.0.post_feedforward_layernorm.weight"
        assert torch.equal(open_checkpoint(start)[norm], open_checkpoint(made["teacher"])[norm][channels])
    text = Packed(made["tokens"] / "calibration")
    rows = shape_search._rows(text, Scores.load(made["scores"]).tokens, config)
    model = load_model(start, torch.float32, machine().device.attention)
    total = tally(model, [shape_search._batch(text, rows)], 1024)
    result = json.loads((found / "search.json").read_text())
    loss = next(each["loss"] for each in result["candidates"] if each["shape"] == result["picked"])
    assert loss == pytest.approx(float(total[0] / total[2]), rel=1e-5)
    assert len(rows) == 8 and total[2] == 8 * 31


def test_no_sequence_that_was_scored_is_measured(world):
    folder, made = world
    config = configure(folder)
    text = Packed(made["tokens"] / "calibration")
    scored = {tuple(row.tolist()) for row in next(stream(text, 512 // 32, 0, 1, 0, config.seed))}
    measured = {tuple(text[row].tolist()) for row in shape_search._rows(text, 512, config)}
    assert len(scored) == 16 and len(measured) == 8 and not scored & measured


def test_what_scoring_left_over_is_every_row_no_position_held(world):
    text = Packed(world[1]["tokens"] / "calibration")
    for used in (0, 1, 7, len(text) - 1, len(text), 2 * len(text)):
        held = {tuple(row.tolist()) for row in next(stream(text, used, 0, 1, 0, 5))} if used else set()
        left = left_over(text, used, 5)
        assert len(left) == max(0, len(text) - used)
        assert not held & {tuple(text[row].tolist()) for row in left}


def test_all_that_scoring_left_is_measured_where_it_is_less_than_asked(world):
    folder, made = world
    text = Packed(made["tokens"] / "calibration")
    rows = shape_search._rows(text, 512, configure(folder, "shape_search.tokens=9999999"))
    assert rows == left_over(text, 16, 0) and len(rows) == len(text) - 16


def test_a_text_that_was_scored_to_its_end_is_refused_before_anything_is_cut(world, tmp_path):
    folder, made = world
    scores = Scores.load(made["scores"])
    all_of_it = len(Packed(made["tokens"] / "calibration")) * 32
    (tmp_path / "scores").mkdir()
    replace(scores, tokens=all_of_it).save(tmp_path / "scores")
    made = made | {"scores": tmp_path / "scores"}
    with pytest.raises(ValueError, match=r"score\.tokens: 512 "):
        made_by(shape_search, configure(folder), made, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_search_that_was_cut_short_measures_no_shape_twice(world, tmp_path):
    folder, made = world
    with pytest.raises(KeyboardInterrupt), calls_of(student_config, KeyboardInterrupt(), at=2) as first:
        made_by(shape_search, configure(folder), made, tmp_path)
    with calls_of(student_config) as second:
        made_by(shape_search, configure(folder), made, tmp_path)
    measured = [given["blueprint"] for given in first + second]
    assert len(first) == 2 and measured[1] == measured[2]  # the shape of the interrupted measurement alone comes twice
    assert len(measured) == len(set(measured)) + 1
    assert not (tmp_path / shape_search.SCRATCH).exists()


def test_one_stage_makes_the_shape_and_the_given_one_depends_on_no_scores(world):
    folder, _ = world
    searching, given = configure(folder), configure(folder, "recipe.shape=given", "shape_search.batch_size=3")
    for config, maker, other in ((searching, shape_search, shape), (given, shape, shape_search)):
        assert maker.enabled(config) and not other.enabled(config)
        assert runner.check(config)[2:7] == ["vocabulary", "teacher_correction", "importance", "shape", "shape_search"]
    assert "scores" not in shape.STAGE.needs
    assert shape.settings(given) == shape.settings(configure(folder, "recipe.shape=given", "device/chip=910B3"))


def test_a_shape_that_is_given_and_limited_by_predictions_or_searched_is_refused(world):
    folder, _ = world
    with pytest.raises(ValueError, match=r"recipe\.shape: search"):
        runner.check(configure(folder, "shape.layers=3"))
    with pytest.raises(ValueError, match=r"budget\.\* .*speedup"):
        runner.check(configure(folder, "recipe.shape=given", "shape.layers=3", "budget.speedup=1.2"))


def test_a_search_among_some_axes_is_refused_and_one_among_all_is_not(world):
    for requested in ("budget.axes=layers", "budget.axes=neurons", "recipe=best"):
        with pytest.raises(ValueError, match=r"^budget.axes: .*recipe.shape=search"):
            runner.check(configure(world[0], requested))
        runner.check(configure(world[0], requested, "recipe.shape=given"))
        runner.check(configure(world[0], requested, "budget.axes=all"))


@pytest.mark.parametrize("biased", [True, False])
def test_a_llama_that_is_to_get_biases_is_searched_as_one_that_has_them(world, biased, tmp_path):
    folder, made = world
    config = configure(folder, f"reinit.bias_compensation={biased}")
    with pytest.raises(KeyboardInterrupt), calls_of(search, KeyboardInterrupt(), at=1) as searched:
        made_by(shape_search, config, made, tmp_path)
    with calls_of(shape_within) as estimated:
        estimate.needs(config, made, 1)
    assert [given["teacher"].even_heads for given in searched + estimated] == [biased, biased]
    plain = configure(folder)
    assert all((stage.settings(config) == stage.settings(plain)) is not biased for stage in (shape, shape_search))


def test_limits_of_speed_and_memory_hold_with_nothing_measured(world, tmp_path):
    folder, made = world
    teacher = open_checkpoint(made["teacher"]).anatomy
    dense = ModelShape.of(teacher)
    config = configure(
        folder, "recipe.shape=given", "device/chip=910B1", "budget.speedup=1.3", "shape_search.batch_size=8"
    )
    serving = Serving(**config.shape_search.serving)
    npu = chip("910B1")
    before = describe(npu, dense, dense, serving)
    limit = 0.5 * before.memory_bytes
    config = config.model_copy(update={"budget": config.budget.model_copy(update={"memory_gb": limit / 1e9})})
    widths = json.loads((made_by(shape, config, made, tmp_path) / "shape.json").read_text())
    after = describe(npu, dense, dense.changed(widths), serving)
    assert before.seconds(serving) >= 1.3 * after.seconds(serving) and after.memory_bytes <= limit
    assert config.budget.limits.keys() == {"speedup", "memory_bytes"}


def test_a_dry_run_of_a_search_answers_for_the_shape_that_promises_most(world):
    folder, made = world
    result = estimate.needs(configure(folder), made, 1)
    assert result.startswith("the search will measure which shape") and "recovery needs 1 x" in result


def result(folder, made, *overrides):
    config = configure(folder, "recipe.shape=given", "device/chip=910B1", "budget.parameters=0.6", *overrides)
    return estimate.needs(config, made | {"shape": made_by(shape, config, made, folder / "dry")}, 1)


def test_a_dry_run_tells_of_the_trainings_of_its_line_and_of_no_other(world):
    recovery, flap, tyr, trsp = (result(*world, f"recipe={name}") for name in ("pangu_light", "flap", "tyr", "trsp"))
    assert recovery.startswith("recovery needs 1 x ") and "regulariz" not in recovery
    for name, said in (("flap", flap), ("tyr", tyr)):
        assert said.startswith(f"recipe {name} has no distill: no weights are trained on its way to {{'layers': ")
        assert "recovery" not in said and "regulariz" not in said
    assert trsp.startswith("regularization needs 1 x ") and "recovery" not in trsp
    assert "; recipe trsp has no distill: no weights are trained after the cut to {'layers': 2," in trsp
    corrected = result(*world, "teacher_correction.tokens=1000")
    assert corrected.startswith("teacher correction needs 1 x ") and "; recovery needs 1 x " in corrected
    assert "no weights are trained after the cut" in result(*world, "recipe=flap", "teacher_correction.tokens=1000")
    policy = result(*world, "onpolicy.tokens=1000", "onpolicy.prompt_tokens=16", "onpolicy.max_new_tokens=48")
    assert policy.startswith("recovery needs 1 x ") and "; on-policy distillation needs 1 x " in policy
    assert "for 960 tokens: 6 steps of" in policy and "on-policy" not in recovery
    line = "recipe.stages=[importance,shape,plan,cut,distill,export]"
    assert "correction" not in result(*world, "teacher_correction.tokens=1000", line)
    both = result(
        *world, "recipe=trsp", "recipe.stages=[importance,shape,layer_gates,regularize,plan,cut,distill,export]"
    )
    assert both.startswith("regularization needs 1 x ") and "; recovery needs 1 x " in both and "no distill" not in both


def test_a_dry_run_counts_the_steps_that_training_takes(world):
    """Tokens that fill no step are not trained on."""
    requested = configure(world[0], "distill.tokens=1000", "distill.global_batch_size=8", "distill.micro_batch_size=4")
    steps = steps_of("distill", requested.distill, requested.data.sequence_length)
    said = result(*world, "distill.tokens=1000", "distill.global_batch_size=8", "distill.micro_batch_size=4")
    assert steps == 3 and "for 768 tokens: 3 steps of" in said


def test_a_dry_run_of_a_line_without_training_asks_for_no_chip(world):
    assert "no distill" in result(*world, "recipe=flap", "device.chip=null")
    with pytest.raises(ValueError, match=r"device\.chip: null"):
        result(*world, "device.chip=null")


def test_a_settling_that_cannot_be_split_is_refused_by_its_own_fields(world):
    folder, made = world
    config = configure(
        folder, "recipe=trsp", "recipe.shape=given", "device/chip=910B1", "regularize.global_batch_size=2"
    )
    with pytest.raises(ValueError, match=r"regularize.global_batch_size.*2.*regularize.micro_batch_size"):
        estimate.needs(config, made | {"shape": made_by(shape, config, made, folder / "dry")}, 3)


def test_a_dry_run_answers_for_a_student_that_was_cut_elsewhere(world):
    folder, made = world
    config = configure(folder, "recipe=recover", "recipe.shape=given", f"model.start={folder / 'model'}")
    config = config.model_copy(update={"device": configure(folder, "device/chip=910B1").device})
    given = estimate.needs(config, made | {"initial_student": folder / "model"}, 1)
    assert given.startswith("recovery needs 1 x ") and "search" not in given


def test_the_report_draws_and_lists_every_measured_shape_and_rings_the_picked_one(found):
    result = json.loads((found / "search.json").read_text())
    dots = [mark for mark in shapes_searched(result).marks if isinstance(mark, Dot)]
    (ring,) = [dot for dot in dots if dot.tip.startswith("selected: ")]
    assert len(dots) == len(result["candidates"]) + 1
    assert [(dot.x, dot.y) for dot in dots if dot.tip == ring.tip.removeprefix("selected: ")] == [(ring.x, ring.y)]
    rows = search_table(result, "").split("<tr>")[2:]
    assert len(rows) == len(result["candidates"])
    fastest = max(result["candidates"], key=lambda each: each["decode_rate"])
    assert f"{fastest['loss']:.3f}" in rows[0]
    assert [f"{result['picked']['neurons']} neurons (selected)" in row for row in rows].count(True) == 1
