"""Teacher correction on a tiny model: the corrected teacher teaches, the given one is what is compared with."""

import json
import shutil

import pytest
import torch

from pipeline import runner
from pipeline.runtime.checkpoint import open_checkpoint
from tests.tiny_text import configured
from tests.watching import texts_read_in_training
from tests.world import make_world, settings

ROUNDS = "recipe.repeat=[importance,shape,plan,cut]"
CORRECTED, RECOVERED = 1024, 2048  # tokens; 256 a step


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("correct"))


def made(world, run, *overrides, **changed):
    """Run a line in this process; give its artifacts by name."""
    small = {"run": run, "evaluate__speed": "false", "report__samples": 0, "teacher_correction__tokens": CORRECTED}
    return runner.run(configured(*settings(world, **(small | changed)), *overrides), "a test")


@pytest.fixture(scope="module")
def corrected(world):
    return made(world, "corrected", teacher_correction__learning_rate=1e-2)


@pytest.fixture(scope="module")
def plain(world):
    return made(world, "plain", teacher_correction__tokens=0)


def inputs(folder):
    return json.loads((folder / "manifest.json").read_text())["inputs"]


def result(world, run, name="report.json"):
    return json.loads((world / "runs" / run / name).read_text())


def dense_of(report):
    return {text: each["teacher"] for text, each in report["perplexity"].items()}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_cuts_and_teaches_reads_the_corrected_teacher_and_what_compares_the_given_one(world, corrected, plain):
    new, given = corrected["teacher"].name, plain["reference"].name
    assert new.startswith("teacher_correction-") and given.startswith("teacher-")
    for stage in ("scores", "blueprint", "initial_student", "recovered"):
        assert {"teacher", "subject"} & set(inputs(corrected[stage])) and given not in inputs(
            corrected[stage]
        ).values(), stage
    for stage in ("reference_evaluation", "evaluation", "report"):
        assert inputs(corrected[stage])["reference"] == given, stage
    assert corrected["reference_evaluation"] == plain["reference_evaluation"] and corrected["tokens"] == plain["tokens"]
    assert dense_of(result(world, "corrected")) == dense_of(result(world, "plain"))
    view = world / "runs" / "corrected"
    assert (view / "teacher").resolve().name == given and (view / "corrected_teacher").resolve().name == new
    assert not (world / "runs" / "plain" / "corrected_teacher").exists()


def test_the_student_is_cut_from_the_corrected_weights(corrected, plain):
    folders = (plain["teacher"], corrected["teacher"], corrected["initial_student"])
    old, new, start = map(open_checkpoint, folders)
    assert set(old) == set(new)
    assert not any(torch.equal(old[name], new[name]) for name in old), "all weights are trained"
    assert torch.equal(start["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    assert (corrected["teacher"] / "tokenizer.json").is_file()


def test_the_correction_lowers_the_next_token_loss_and_the_report_shows_it(world, corrected):
    losses = [row["held_out_cross_entropy"] for row in rows(corrected["teacher"]) if "held_out_cross_entropy" in row]
    assert losses[-1] < losses[0] - 0.1
    view = world / "runs" / "corrected"
    report, page = result(world, "corrected"), (view / "report.html").read_text()
    assert report["correction"]["curves"]["held_out_cross_entropy"] == {"first": losses[0], "last": losses[-1]}
    assert report["correction"]["tokens"] == CORRECTED and "teacher_correction" in report["stages"]
    assert "Teacher correction</h2>" in page and (view / "figures" / "correction.png").is_file()


def test_without_a_correction_there_is_no_word_of_it(world, plain):
    assert "correction" not in result(world, "plain")
    assert "Teacher correction" not in (world / "runs" / "plain" / "report.html").read_text()


def test_recovery_reads_on_where_the_correction_ended(world):
    """Both together read the sequences that a recovery as long as both reads, in its order."""
    with texts_read_in_training() as alone:
        lasting = CORRECTED + RECOVERED
        made(world, "alone", teacher_correction__tokens=0, distill__tokens=lasting, artifacts=world / "alone")
    with texts_read_in_training() as both:
        made(world, "both", distill__tokens=RECOVERED, artifacts=world / "both")
    assert len(both) > 1 and torch.equal(torch.cat(both), torch.cat(alone))
    assert sum(ids.numel() for ids in both) == CORRECTED + RECOVERED


def test_a_part_of_the_line_reads_the_corrected_teacher_too(world, corrected):
    part = made(world, "part", "stages=[importance]", teacher_correction__learning_rate=1e-2, artifacts=world / "part")
    assert inputs(part["scores"])["subject"] == corrected["teacher"].name


def test_a_teacher_with_code_of_its_own_keeps_it(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    code = "from transformers import LlamaForCausalLM\n\n\nclass Mine(LlamaForCausalLM):\n    pass\n"
    (tmp_path / "model" / "modeling_mine.py").write_text(code)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    own = {"model__path": tmp_path / "model", "model__trust_remote_code": "true", "artifacts": tmp_path / "artifacts"}
    part = made(world, "own", "stages=[importance]", **own)
    assert inputs(part["scores"])["subject"] == part["corrected_teacher"].name
    assert (part["corrected_teacher"] / "modeling_mine.py").is_file()


def test_a_line_without_the_stage_is_as_without_its_tokens(world, plain, tmp_path):
    """Where nothing is cut, the stage has nothing to do, and recovery reads its text from the beginning."""
    given = {"model__start": plain["initial_student"], "recipe": "recover"}
    requested = [
        made(
            world,
            f"recover-{tokens}",
            "recipe.stages=[external_student,distill]",
            teacher_correction__tokens=tokens,
            **given,
        )
        for tokens in (0, CORRECTED)
    ]
    assert requested[0]["recovered"] == requested[1]["recovered"]


def test_right_before_recovery_it_teaches_alone(world, plain):
    last = made(world, "late", "recipe.stages=[importance,shape,plan,cut,teacher_correction,distill,export]")
    assert last["initial_student"] == plain["initial_student"]
    assert inputs(last["recovered"])["teacher"] == last["corrected_teacher"].name == last["teacher"].name


def test_in_rounds_the_corrected_teacher_teaches_all_of_them(world):
    wide = {"shape__neurons": None, "shape__layers": None, "budget__parameters": 0.8, "distill__global_batch_size": 4}
    last = made(world, "rounds", "recipe=adapt_pruner", recipe__rounds=2, plan__amplitude=0.05, **wide)
    folder = last["corrected_teacher"].name
    assert last["teacher"].name == folder
    second = inputs(last["recovered"])
    first = inputs(last["recovered"].parent / second["previous_student"])
    assert second["teacher"] == folder and first["teacher"] == folder
    assert inputs(last["evaluation"])["reference"] == last["reference"].name != folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("teacher_correction.tokens=100",), r"^teacher_correction\.tokens: 100 "),
        (
            ("teacher_correction.global_batch_size=6",),
            r"^teacher_correction\.global_batch_size: 6 .*teacher_correction\.micro_batch_size",
        ),
        (("recipe.stages=[importance,shape,plan,cut,export]",), "teacher_correction"),
        (("teacher_correction.eval_tokens=64",), r"^teacher_correction\.eval_tokens: 64, .*distill\.eval_tokens"),
        (
            ("recipe.stages=[teacher_correction,importance,shape,teacher_correction,plan,cut,export]",),
            r"^recipe\.stages: .*teacher_correction",
        ),
        (
            ("recipe.stages=[importance,shape,plan,cut,distill,teacher_correction,export]",),
            r"^recipe\.stages: .*teacher_correction",
        ),
        (
            ("recipe.rounds=2", "recipe.stages=[importance,shape,plan,cut,teacher_correction,distill,export]", ROUNDS),
            r"^recipe\.stages: .*teacher_correction",
        ),
    ],
)
def test_a_correction_that_cannot_be_is_refused(world, overrides, message):
    with pytest.raises(ValueError, match=message):
        made(world, "refused", *overrides)
