"""Recovery on the assistant's turns alone: two ranks take the steps of one, whatever each of them counts."""

import json
import shutil

import pytest
import torch

from pipeline import runner
from pipeline.data.packing import Packed
from pipeline.model.marks import positions
from tests.chat_templates import CHATML, assistant, user
from tests.tiny_text import configured
from tests.world import losses, make_world, pipeline, settings, text

STAGES = "stages=[importance,shape,plan,cut,distill]"

ON_POLICY = (
    "onpolicy.tokens=384",
    "onpolicy.prompt_tokens=16",
    "onpolicy.min_new_tokens=4",
    "onpolicy.max_new_tokens=12",
    "stages=[importance,shape,plan,cut,distill,onpolicy]",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world whose text is chats, with answers of very different lengths, beside documents that are no chats."""
    folder = make_world(tmp_path_factory.mktemp("chats"))
    (folder / "model" / "chat_template.jinja").write_text(CHATML)
    for name, seed in (("calibration", 1), ("recovery", 2), ("evaluation", 3)):
        said = text(300, seed).split(". ")
        chats = [
            [user(said[n]), assistant(" ".join(said[n + 1 : n + 2 + n % 5 * 3]))] for n in range(0, len(said) - 15)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return folder


def chosen(world, run):
    paths = {f"data__{name}__path": world / f"{name}.jsonl" for name in ("calibration", "evaluation")}
    both = f"[{world / 'recovery.jsonl'},{world / 'recovery.txt'}]"
    return [
        *settings(world, run=run, artifacts=world / run, **paths, data__recovery__path=both),
        "data.text_field=messages",
        "data.loss_on=assistant",
        "distill.loss.cross_entropy=0.2",
        STAGES,
    ]


def test_two_ranks_take_the_steps_of_one(world):
    made = runner.run(configured(*chosen(world, "one")), "a test")
    packed = Packed(made["tokens"] / "recovery")
    counted = [(packed.stored(row) >= 0).mean() for row in range(len(packed))]
    assert min(counted) < 0.9 and max(counted) == 1.0, "chats beside documents that count whole"
    assert not Packed(made["tokens"] / "calibration").marked
    pipeline(*chosen(world, "two"), "distill.micro_batch_size=2", cwd=world, ranks=2)
    one, two = losses(world / "one"), losses(world / "two")
    assert len(one) == len(two) > 4 and max(abs(a - b) for a, b in zip(one, two)) < 1e-4 * max(one)
    shutil.rmtree(world / "two")


def test_two_ranks_under_zero_3_write_the_answers_of_one(world):
    """Prompts of different lengths, answers that end early: the ranks run equally many passes."""
    words = [word for word in chosen(world, "one") if word != STAGES] + list(ON_POLICY)
    found = []
    for ranks, extra in ((2, ("distill.micro_batch_size=2", "deepspeed=zero3")), (0, ())):
        done = pipeline(*words, *extra, cwd=world, ranks=ranks)
        assert "onpolicy: step 6/6" in done.stdout
        (folder,) = (world / "one").glob("onpolicy-*")
        found.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        shutil.rmtree(folder)
    two, one = ([row["loss"] for row in rows if "loss" in row] for rows in found)
    assert len(one) == 6 and max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4 * max(one)


def test_answers_are_measured_alone_and_reported(world):
    small = ["evaluate.speed=false", "evaluate.words=4", "report.samples=1", "report.sample_tokens=2"]
    words = [*chosen(world, "one"), *small, "evaluate.answers=2", "evaluate.answer_tokens=3"]
    made = runner.run(configured(*(word for word in words if word != STAGES)), "a test")
    text = json.loads((made["evaluation"] / "evaluation.json").read_text())["texts"]["evaluation"]
    found, whole = text["assistant"], Packed(made["tokens"] / "evaluation" / "00-evaluation")
    rows = [torch.from_numpy(whole.stored(row).astype("int64")) for row in range(text["sequences"])]
    assert found["tokens"] == int(positions(torch.stack(rows)).sum()) < text["tokens"]
    assert found["kl"] > found["kl_error"] > 0 and 0 < found["agreement"] < 1 and found["greedy"]["answers"] == 2
    start = found["start"]
    assert start["tokens"] == found["tokens"] and 0 < start["kl"] != found["kl"] and start["greedy"]["answers"] == 2
    report = json.loads((made["report"] / "report.json").read_text())
    (sample,) = report["samples"]
    assert sample["prompt"].endswith("assistant\n") and 30 < len(sample["prompt"]) <= 200
    assert sample["reference"]
    assert report["perplexity"]["evaluation"]["assistant"] == found
    assert "perplexity of answers, evaluation" in (made["report"] / "report.html").read_text()
