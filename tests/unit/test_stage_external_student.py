"""The stage external_student: a student cut elsewhere is recovered as if cut here, or refused in one line."""

import json
import re
import shutil

import pytest
import torch

from pipeline import runner
from pipeline.estimate import omitted
from pipeline.runtime.checkpoint import open_checkpoint
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import configured
from tests.world import make_world, pipeline, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("adopt"), "llama-tied")


def made(world, *overrides):
    return runner.run(configured(*settings(world, run="unit"), *overrides), "a test")


def test_recovery_does_not_depend_on_who_cut(world, tmp_path):
    pipeline(*settings(world, run="ours"), "stages=[importance,shape,plan,cut,distill]", cwd=world)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in (world / "runs/ours/initial_student").iterdir():
        if file.name != "manifest.json":
            (elsewhere / file.name).write_bytes(file.read_bytes())
    pipeline(*settings(world, run="theirs"), "recipe=recover", f"model.start={elsewhere}", cwd=world)
    first, second = (open_checkpoint(folder) for folder in sorted((world / "artifacts").glob("distill-*")))
    assert first.folder != second.folder and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (world / "runs/theirs/evaluation.json").is_file()


def test_a_dry_run_estimates_for_the_given_student(world, tmp_path, capsys):
    save_tiny(tiny_model("llama-tied", dtype=torch.float32, num_hidden_layers=2), tmp_path / "given")
    chosen = ("recipe=recover", "dry_run=true", "device/chip=910B1", "device.kind=cpu", "track.mode=offline")
    places = (f"artifacts={tmp_path / 'artifacts'}", f"runs={tmp_path / 'runs'}")
    assert made(world, *chosen, *places, f"model.start={tmp_path / 'given'}") == {}
    assert re.fullmatch(r"recovery needs 1 x .*; not in these times: evaluate\n", capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


@pytest.mark.parametrize(("kind", "named"), [("llama", "evaluate"), ("gemma3_text", "absorb_norms, evaluate")])
def test_a_dry_run_names_the_stages_without_a_time_that_apply_to_the_model(tmp_path, kind, named):
    source = save_tiny(tiny_model(kind), tmp_path / "m")
    config = configured(*settings(make_world(tmp_path / "w", "llama")), "dry_run=true")
    stages = ("importance", "absorb_norms", "distill", "evaluate")
    assert omitted(config, {"teacher": source}, stages) == f"; not in these times: {named}"


@pytest.mark.parametrize("own", [False, True])
def test_a_student_without_a_tokenizer_gets_the_teachers_and_one_with_its_own_keeps_it(world, tmp_path, own):
    given = tmp_path / "given"
    save_tiny(tiny_model("llama-tied", dtype=torch.float32, num_hidden_layers=2), given)
    (given / "generation_config.json").write_text('{"max_new_tokens": 7}')
    if own:
        shutil.copy(world / "model/tokenizer.json", given)
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
        (given / "tokenizer_config.json").write_text(json.dumps(fields))
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    student = made(world, "recipe=recover", f"model.start={given}", "stages=[external_student]")["initial_student"]
    assert json.loads((student / "generation_config.json").read_text()) == {"max_new_tokens": 7}
    copied = {path.name: path.read_bytes() for path in student.glob("tokeniz*")}
    teachers = {path.name: path.read_bytes() for path in (world / "model").glob("tokeniz*")}
    assert len(teachers) > 1 and copied.keys() == teachers.keys() and (copied == teachers) is not own
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before


def test_a_student_with_more_or_fewer_rows_without_a_token_is_recovered(world, tmp_path):
    """The tokenizer has 96 tokens; the teacher, which is the student of another run here, 96 rows, or 104."""
    sizes = {"wide": 104, "plain": 96}
    for name, size in sizes.items():
        model = tiny_model("llama-tied", dtype=torch.float32, num_hidden_layers=2, vocab_size=size)
        save_tiny(model, tmp_path / name)
        for path in (world / "model").glob("tokeniz*"):
            shutil.copy(path, tmp_path / name)
    for teacher, student in (("wide", "plain"), ("plain", "wide")):
        chosen = (f"model.path={tmp_path / teacher}", f"model.start={tmp_path / student}", "distill.max_steps=1")
        folders = made(world, "recipe=recover", "recipe.stages=[external_student,distill]", *chosen)
        assert open_checkpoint(folders["recovered"]).config["vocab_size"] == sizes[student]


def test_a_student_whose_tokenizer_gives_other_ids_is_refused_before_any_work(world, tmp_path):
    given = tmp_path / "given"
    save_tiny(tiny_model("llama-tied", dtype=torch.float32, num_hidden_layers=2), given)
    shutil.copy(world / "model/tokenizer_config.json", given)
    fields = json.loads((world / "model/tokenizer.json").read_text())
    vocab = fields["model"]["vocab"]
    swapped = [token for token, number in vocab.items() if number in (40, 41)]
    vocab.update(zip(swapped, [vocab[token] for token in reversed(swapped)]))
    (given / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="^model.start: the tokenizer of .* gives other ids than the teacher's"):
        runner.check(configured(*settings(world, run="unit"), "recipe=recover", f"model.start={given}"))


def test_unusable_students_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="model.start is not set"):
        made(world, "recipe=recover")
    with pytest.raises(ValueError, match="model.start: .* does not exist"):
        made(world, "recipe=recover", f"model.start={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="external_student"):
        made(world, f"model.start={world / 'model'}")
    save_tiny(tiny_model("llama-tied", dtype=torch.float32, vocab_size=40), tmp_path / "other")
    with pytest.raises(ValueError, match="needs one vocabulary"):
        made(world, "recipe=recover", f"model.start={tmp_path / 'other'}")
