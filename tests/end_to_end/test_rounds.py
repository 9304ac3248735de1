"""Rounds of pruning and recovery on a tiny model through the whole pipeline: Adapt-Pruner, straight and interrupted."""

import json
import re
from html import unescape

import pytest
import torch

from pipeline import runner
from pipeline.distill.schedule import learning_rate
from pipeline.model.blueprint import Blueprint, Step
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint import open_checkpoint
from tests.tiny_text import configured
from tests.watching import watched
from tests.world import make_world, settings

STEPS, TOKENS = 16, 256  # of the whole recovery; of a step


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("rounds"), num_key_value_heads=4, intermediate_size=128)


def made(world, *overrides, **changed):
    """Run a line of two rounds in this process; give its artifacts by name."""
    given = {"shape__layers": None, "shape__neurons": None, "evaluate__speed": "false", "report__samples": 0}
    recovery = {"distill__tokens": STEPS * TOKENS, "distill__micro_batch_size": 8, "recipe__rounds": 2}
    return runner.run(configured(*settings(world, **(given | recovery | changed)), *overrides), "a test")


def adapted(world, run, *overrides, **changed):
    chosen = {"budget__parameters": 0.6, "plan__amplitude": 0.15, "run": run}
    return made(world, "recipe=adapt_pruner", *overrides, **(chosen | changed))


@pytest.fixture(scope="module")
def straight(world):
    return adapted(world, "straight")


def view(world, run="straight"):
    return world / "runs" / run


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in metrics(folder)]


def recovered(world, artifacts="artifacts"):
    """The student folders of the two rounds of a budget, the first first."""
    folders = [folder for folder in (world / artifacts).glob("distill-*") if len(metrics(folder)) > STEPS // 2]
    return sorted(folders, key=lambda folder: len(metrics(folder)))


def test_two_rounds_give_a_student_within_the_budget_whose_layers_differ(world, straight):
    teacher, student = open_checkpoint(world / "model").anatomy, open_checkpoint(view(world) / "student").anatomy
    kept = student.parameters()[1] / teacher.parameters()[1]
    half = open_checkpoint(recovered(world)[0]).anatomy
    assert 0.5 < kept <= 0.6 < half.parameters()[1] / teacher.parameters()[1] <= 0.8
    assert not student.sizes.uniform and student.sizes.hidden == 32 and len(student.sizes.layers) == 4
    for now, before in zip(student.sizes.layers, half.sizes.layers, strict=True):
        assert now.groups <= before.groups and now.neurons <= before.neurons


def test_the_blueprint_tells_what_of_the_teacher_is_in_the_student(world, straight):
    """Cut from the teacher at once, it has the student's shapes; and the second round cut what the first recovered."""
    teacher, start = open_checkpoint(world / "model"), open_checkpoint(view(world) / "initial_student")
    whole = Blueprint.load(view(world))
    whole.check(teacher.anatomy)
    assert whole.student(teacher.anatomy).shapes() == start.anatomy.shapes()
    first = Blueprint.load(view(world) / "rounds" / "1")
    for now, before in zip(whole.layers, first.layers, strict=True):
        assert set(now.neurons) <= set(before.neurons)
    (folder,) = (path.parent for path in (world / "artifacts").glob("plan-*/step.json"))
    student = open_checkpoint(recovered(world)[0])
    for name, tensor in cut(student.anatomy, Step.load(folder), student):
        assert torch.equal(tensor, start[name])


def test_one_schedule_one_text_and_one_curve_run_through_all_rounds(world, straight):
    rows = metrics(recovered(world)[1])
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in steps] == [TOKENS * step for step in range(1, STEPS + 1)]
    rates = [row["learning_rate"] for row in steps]
    assert rates[:13] == [3e-4] * 13 and rates[14:] == sorted(rates[14:], reverse=True) and rates[-1] < 1e-5
    assert metrics(recovered(world)[0]) == rows[: len(metrics(recovered(world)[0]))]
    held = [(row["step"], row["held_out_kl"]) for row in rows if "held_out_kl" in row]
    assert [step for step, _ in held] == [0, 4, 8, 8, 12, 16]
    assert held[3][1] > held[2][1], "the second cut costs what recovery then wins back"
    report = json.loads((view(world) / "report.json").read_text())
    assert report["recovery"]["tokens"] == STEPS * TOKENS
    curve = report["recovery"]["curves"]["held_out_kl"]
    assert (curve["first"], curve["last"]) == (held[0][1], held[-1][1])
    result = json.loads((view(world) / "run.json").read_text())["stages"]
    assert {"importance, round 1", "distill, round 1", "importance", "distill", "report"} <= set(result)
    both = [json.loads((f / "manifest.json").read_text())["seconds"] for f in recovered(world)]
    assert report["stages"]["distill"]["seconds"] == pytest.approx(sum(both))
    assert report["cut"]["layers"] == 4 and report["cut"]["neurons"] == 512


def test_the_report_tells_what_each_round_left_and_where_it_cut(world, straight):
    report, text = json.loads((view(world) / "report.json").read_text()), (view(world) / "report.html").read_text()
    rounds, students = report["rounds"]["rounds"], [open_checkpoint(folder).anatomy for folder in recovered(world)]
    assert [each["parameters"] for each in rounds] == [student.parameters()[0] for student in students]
    assert rounds[-1]["parameters"] == report["parameters"]["student"]
    assert [each["tokens"] for each in rounds] == [STEPS * TOKENS // 2, STEPS * TOKENS]
    held = [row["held_out_kl"] for row in metrics(recovered(world)[1]) if "held_out_kl" in row]
    assert [each["held_out_kl"] for each in rounds] == [[held[0], held[2]], [held[3], held[5]]]
    assert "round 2 begins" in text and text.count("round 2 begins") == 3 and "round 3" not in text
    assert (view(world) / "figures" / "rounds.png").is_file()
    assert report["export"]["form"] == "own" and f'{view(world)}/student", trust_remote_code=True' in unescape(text)


def test_the_original_teaches_in_every_round(world, straight):
    links = [json.loads((folder / "manifest.json").read_text())["inputs"] for folder in recovered(world)]
    assert "previous_student" not in links[0] and links[1]["teacher"] == links[0]["teacher"]
    assert links[1]["previous_student"] == recovered(world)[0].name


def test_a_second_run_does_no_work(world, straight, capsys):
    adapted(world, "straight")
    assert "nothing to do" in capsys.readouterr().out


def test_cut_off_in_the_second_round_it_goes_on_as_if_nothing_had_happened(world, straight, capsys):
    place = world / "cut-off"

    def dying(given):
        if given["step"] == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched({learning_rate: dying}):
        adapted(world, "cut-off", artifacts=place)
    assert len(list(place.glob("distill-*"))) == 1
    capsys.readouterr()
    adapted(world, "cut-off", "stages=[importance,shape,plan,cut,distill]", artifacts=place)
    said = capsys.readouterr().out
    assert (
        "distill: resumes after step 12 of 16" in said
        and len(re.findall(r", importance \(.*\): finished before", said)) == 2
    )
    for one, other in zip(recovered(world), recovered(world, "cut-off"), strict=True):
        tensors = open_checkpoint(one)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in open_checkpoint(other).items())
        assert timeless(one) == timeless(other)


def test_without_its_recovery_a_round_ends_the_line(world, capsys):
    adapted(world, "part", "stages=[importance,shape,plan,cut]", seed=3)
    assert re.search(r"^stages: round 2 of 2 ", capsys.readouterr().out, re.MULTILINE)


def test_a_shape_is_reached_in_equal_parts(world):
    """Pangu Light's line in two rounds: depth, channels, heads and neurons half the way, then all of it."""
    given = {"shape__layers": 2, "shape__hidden": 16, "shape__groups": 2, "shape__heads": 2, "shape__neurons": 64}
    stages = "stages=[importance,shape,plan,cut,absorb_norms,distill]"
    made(world, stages, run="shape", distill__loss__hidden=0.5, distill__tokens=4 * TOKENS, **given)
    starts = [
        open_checkpoint(view(world, f"shape{part}") / "initial_student").anatomy.sizes for part in ("/rounds/1", "")
    ]
    assert [len(sizes.layers) for sizes in starts] == [3, 2] and starts[1].hidden == 16
    assert [sizes.layers[0].neurons for sizes in starts] == [96, 64]
    assert [sizes.layers[0].groups for sizes in starts] == [3, 2]
    whole = Blueprint.load(view(world, "shape"))
    assert whole.student(open_checkpoint(world / "model").anatomy).sizes == starts[1]
