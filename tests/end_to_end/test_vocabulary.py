"""A run that prunes the vocabulary: its teacher is the reference restricted to the kept tokens; both are measured."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from pipeline.model.shape import Shape
from pipeline.model.token_ids import Renumbering, Vocabulary
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.model_loader import load_model, load_tokenizer
from pipeline.stages.choose import shape
from pipeline.stages.prepare import vocabulary
from tests.students import machine
from tests.tiny_text import configured
from tests.world import make_world, pipeline, settings

SIZE = 64
GENERATION = {"eos_token_id": [2], "bos_token_id": 1, "suppress_tokens": [2, 80, 95], "do_sample": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("vocabulary"), tie_word_embeddings=True)
    (world / "model" / "generation_config.json").write_text(json.dumps(GENERATION))
    return world


@pytest.fixture(scope="module")
def command(world):
    return [*settings(world, run="few"), f"budget.vocabulary={SIZE}", "evaluate.speed=true", "report.samples=1"]


@pytest.fixture(scope="module")
def run(world, command):
    pipeline(*command, cwd=world)
    return world / "runs" / "few"


@pytest.fixture(scope="module")
def made(world, run):
    (folder,) = (world / "artifacts").glob("vocabulary-*")
    return folder


def test_the_student_has_as_many_tokens_as_asked_for_and_a_tokenizer_for_them(run):
    student = run / "student"
    assert open_checkpoint(student).config["vocab_size"] == SIZE
    assert load_file(student / "model.safetensors")["model.embed_tokens.weight"].shape == (SIZE, 32)
    tokenizer = load_tokenizer(student)
    text = "The quick brown fox brew potions."
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < SIZE == len(tokenizer) and tokenizer.decode(ids) == text
    assert not list(student.glob("merges.txt")) and not list(student.glob("vocab.json"))


def test_ids_in_the_configs_follow_their_tokens(world, run, made):
    places = Vocabulary.load(made).renumbering.places
    student, teacher = (load_tokenizer(folder) for folder in (run / "student", world / "model"))
    assert student.eos_token_id == places[teacher.eos_token_id]
    config = open_checkpoint(run / "student").config
    assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [places[number] for number in (0, 1, 2)]
    written = json.loads((run / "student" / "generation_config.json").read_text())
    ids = {"eos_token_id": [places[2]], "bos_token_id": places[1]}
    assert written == GENERATION | ids | {"suppress_tokens": [places[n] for n in (2, 80, 95) if n in places]}


def test_files_without_ids_are_carried_under_their_paths(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    files = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "special_tokens_map.json")
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    out.mkdir()
    vocabulary._write_tokenizer(source, {}, Renumbering({}, 0, 0), out)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.*")} == {*files, "tokenizer.json"}


def test_the_teacher_is_the_reference_restricted_to_the_kept_tokens(world, made):
    kept = torch.tensor(Vocabulary.load(made).kept)
    ids = torch.randint(0, SIZE, (2, 10), generator=torch.Generator().manual_seed(0))
    reference, teacher = (load_model(folder, torch.float64, "eager") for folder in (world / "model", made))
    with torch.no_grad():
        whole, own = reference(kept[ids]).logits.softmax(-1)[..., kept], teacher(ids).logits.softmax(-1)
    torch.testing.assert_close(own, whole / whole.sum(-1, keepdim=True), rtol=1e-12, atol=0)


def test_both_models_are_measured_on_the_same_text(run):
    found = json.loads((run / "evaluation.json").read_text())
    assert [found["models"][who]["shape"]["vocabulary"] for who in ("teacher", "student")] == [96, SIZE]
    assert found["models"]["student"]["checkpoint_bytes"] < found["models"]["teacher"]["checkpoint_bytes"]
    (text,) = found["texts"].values()
    unit = text["bytes"] / text["tokens"]
    assert text["teacher"]["bytes_per_token"] == unit > text["student"]["bytes_per_token"]
    for who in ("teacher", "start", "student"):
        assert math.log2(text[who]["perplexity"]) == pytest.approx(text[who]["bits_per_byte"] * unit)
    read = 31 * len(text["student"]["losses"]) * text["student"]["bytes_per_token"]
    assert read == pytest.approx(text["bytes"], rel=0.05)
    ratio = text["student"]["perplexity"] / text["teacher"]["perplexity"]
    assert text["student"]["over_teacher"]["times"] == pytest.approx(ratio)
    assert text["student"]["over_teacher"]["error"] > 0


def test_the_report_shows_the_vocabulary_before_and_after(run):
    report = json.loads((run / "report.json").read_text())
    assert [report["shape"][who]["vocabulary"] for who in ("teacher", "student")] == [96, SIZE]
    assert "vocabulary" in report["stages"]


def test_more_tokens_than_there_are_keep_the_model_and_its_text_as_they_are(world, command, made, tmp_path):
    (text,) = (world / "artifacts").glob("tokens-*")
    config = configured(*command, "budget.vocabulary=500")
    vocabulary.run(config, {"teacher": world / "model", "tokens": text}, tmp_path / "all", machine())
    whole, again = (load_file(each / "model.safetensors") for each in (world / "model", tmp_path / "all"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    before, after = (json.loads((each / "tokenizer.json").read_text()) for each in (world / "model", tmp_path / "all"))
    assert before == after
    for shard in text.rglob("*.npy"):
        assert shard.read_bytes() == (tmp_path / "all" / shard.relative_to(text)).read_bytes()


def test_a_budget_of_tokens_alone_keeps_all_widths(world, tmp_path):
    config = configured(*settings(world, shape__layers=None, shape__neurons=None), f"budget.vocabulary={SIZE}")
    shape.run(config, {"teacher": world / "model"}, tmp_path, machine())
    assert Shape.load(tmp_path) == Shape(layers=4, hidden=32, heads=4, groups=2, neurons=24)
    others = (config.budget.model_copy(update={name: 0.5}) for name in ("parameters", "total", "speedup"))
    assert not any(budget.of_tokens_alone for budget in others)


def test_an_external_student_and_a_budget_of_tokens_are_refused():
    with pytest.raises(ValueError, match=r"^budget\.vocabulary: "):
        configured("recipe=recover", "model.start=somewhere", "budget.vocabulary=64")
