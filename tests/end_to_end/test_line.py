"""The real command on tiny models: the whole pipeline, a second run, a changed setting, a sweep, several ranks."""

import json
import re
import subprocess
import sys

import pytest
import torch

from pipeline.runtime.checkpoint import open_checkpoint
from tests.world import make_world, pipeline, settings

FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("the quick brown fox", return_tensors="pt").input_ids
new = model.generate(ids, max_new_tokens=5, do_sample=False)
assert "pipeline" not in sys.modules
print(type(model).__name__, new.shape[1] - ids.shape[1])
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def first(world):
    return pipeline("run=first", *settings(world), cwd=world).stdout


def test_one_command_gives_a_smaller_model_and_a_report(world, first):
    run = world / "runs" / "first"
    report = json.loads((run / "report.json").read_text())
    teacher, student = open_checkpoint(world / "model"), open_checkpoint(run / "student")
    assert report["parameters"]["student"] == student.anatomy.parameters()[0] < teacher.anatomy.parameters()[0]
    kept = student.anatomy.parameters()[0] / teacher.anatomy.parameters()[0]
    assert f"({kept:.1%} of those before)" in first and "is read" not in first
    assert student.config["num_hidden_layers"] == 3 and student.config["intermediate_size"] == 16
    for place in report["perplexity"].values():
        assert place["teacher"]["perplexity"] > 1 and place["student"]["perplexity"] > 1
    assert {"importance", "cut", "distill"} <= set(report["stages"])
    assert all(stage["seconds"] > 0 and stage["peak_memory"] > 0 for stage in report["stages"].values())
    assert "<html" in (run / "report.html").read_text()
    assert list((run / "figures").glob("*.png"))
    assert json.loads((run / "blueprint.json").read_text())["layers"]


def test_the_student_loads_in_a_fresh_process_with_only_transformers_and_generates(world, first):
    student = world / "runs" / "first" / "student"
    done = subprocess.run([sys.executable, "-I", "-c", FRESH, str(student)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlamaForCausalLM", "5"]


def test_a_second_run_does_no_work_and_says_so(world, first):
    before = {path: path.stat().st_mtime_ns for path in (world / "artifacts").rglob("*") if path.is_file()}
    said = pipeline("run=first", *settings(world), cwd=world).stdout
    assert "nothing to do" in said
    after = {path: path.stat().st_mtime_ns for path in (world / "artifacts").rglob("*") if path.is_file()}
    assert after == before


def test_a_recovery_text_that_is_read_several_times_is_reported(world, first, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text((world / "recovery.txt").read_text()[:2500])
    given = settings(world, data__recovery__path=short, distill__eval_tokens=64)
    said = pipeline("run=short", *given, "stages=[importance,shape,plan,cut,distill]", cwd=world).stdout
    found = re.search(r"distill: the recovery text has (\d+) sequences and is read (\d+\.\d) times", said)
    assert found and float(found[2]) == round(64 / int(found[1]), 1) > 1


def test_a_changed_setting_redoes_only_what_depends_on_it(world, first):
    chosen = settings(world, plan__clap="false")
    said = pipeline("run=other", *chosen, "stages=[importance,shape,plan,cut]", cwd=world).stdout
    for stage in ("teacher", "tokens", "importance", "shape"):
        assert re.search(rf", {stage} \(.*\): finished before", said), stage
    for stage in ("plan", "cut"):
        assert not re.search(rf", {stage} \(.*\): finished before", said), stage


def test_a_part_that_needs_an_unmade_artifact_says_which_stage_makes_it(world, first):
    done = pipeline("run=part", *settings(world, seed=7), "stages=[plan]", cwd=world, check=False)
    assert done.returncode == 2
    assert "plan reads scores, which importance makes" in done.stdout


def test_a_sweep_of_three_shapes_scores_once(world):
    chosen = settings(world, seed=11, shape__layers=None)
    said = pipeline(
        "run=sweep", *chosen, "shape.layers=2,3,4", "stages=[importance,shape,plan,cut]", "--multirun", cwd=world
    ).stdout
    assert len(re.findall(r"importance\b.*: finished before", said)) == 2
    views = sorted(path.name for path in (world / "runs" / "sweep").iterdir() if path.is_dir())
    assert views == ["shape.layers=2", "shape.layers=3", "shape.layers=4"]
    for layers in (2, 3, 4):
        start = world / "runs" / "sweep" / f"shape.layers={layers}" / "initial_student"
        assert open_checkpoint(start).config["num_hidden_layers"] == layers


def test_a_sweep_is_tracked_by_the_real_wandb_through_to_each_report(world):
    chosen = settings(world, seed=12, shape__layers=None, track__mode="offline", evaluate__speed="false")
    pipeline("run=tracked", *chosen, "shape.layers=2,3", "--multirun", cwd=world)
    for layers in (2, 3):
        run = world / "runs" / "tracked" / f"shape.layers={layers}"
        assert (run / "report.html").is_file() and json.loads((run / "report.json").read_text())["parameters"]
        assert len(list(run.glob("wandb/offline-run-*/*.wandb"))) == 1
    (table,) = (world / "runs" / "tracked").glob("wandb/offline-run-*/files/media/table/comparison*.json")
    rows = json.loads(table.read_text())
    assert [row[rows["columns"].index("settings.shape.layers")] for row in rows["data"]] == [2.0, 3.0]


def test_two_ranks_under_torchrun_give_the_student_of_one(world):
    chosen = settings(world, artifacts=world / "one", distill__micro_batch_size=8)
    pipeline("run=one", *chosen, "stages=[importance,shape,plan,cut,distill]", cwd=world)
    chosen = settings(world, artifacts=world / "two", distill__micro_batch_size=4)
    pipeline("run=two", *chosen, "deepspeed=zero3", "stages=[importance,shape,plan,cut,distill]", cwd=world, ranks=2)
    scores = [open_scores(world / "runs" / name) for name in ("one", "two")]
    for name in scores[0]:
        torch.testing.assert_close(scores[0][name], scores[1][name], rtol=1e-5, atol=1e-5)
    losses = [[row["loss"] for row in rows(world / folder)] for folder in ("one", "two")]
    assert len(losses[0]) == 8
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-4, atol=1e-6)


def test_a_sweep_under_torchrun_recovers_each_student_as_a_run_of_its_own_does(world):
    """The ranks keep their process group from job to job, and DeepSpeed's second start sees nothing of its first."""
    stages = "stages=[importance,shape,plan,cut,distill]"
    swept = settings(world, shape__layers=None, artifacts=world / "swept")
    pipeline("run=swept", *swept, "shape.layers=2,3", stages, "--multirun", cwd=world, ranks=2)
    pipeline("run=alone", *settings(world, artifacts=world / "alone"), stages, cwd=world, ranks=2)
    (alone,) = (world / "alone").glob("distill-*")
    assert len(list((world / "swept").glob("distill-*"))) == 2
    theirs, ours = open_checkpoint(world / "swept" / alone.name), open_checkpoint(alone)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def open_scores(view):
    from safetensors.torch import load_file

    return load_file(view / "scores" / "scores.safetensors")


def rows(artifacts):
    (folder,) = artifacts.glob("distill-*")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_sandwich_model_is_absorbed_recovered_and_folded_to_its_plain_class(tmp_path):
    world = make_world(tmp_path, "glm4")
    said = pipeline("run=glm", *settings(world), cwd=world).stdout
    assert "static scales" in said
    assert open_checkpoint(world / "runs" / "glm" / "student").config["model_type"] == "glm"
