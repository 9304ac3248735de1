"""A student cut elsewhere: recovered as if it had been cut here, or refused in one line."""

import pytest
import torch

from pipeline import runner
from pipeline.runtime.checkpoint import open_checkpoint
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import configured
from tests.world import make_world, pipeline, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("adopt"), "llama-tied")


def made(world, *overrides):
    return runner.run(configured(*settings(world, run="unit"), *overrides), "a test")


def test_recovery_does_not_ask_who_cut(world, tmp_path):
    pipeline(*settings(world, run="ours"), "stages=[importance,shape,plan,cut,distill]", cwd=world)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in (world / "runs/ours/start").iterdir():
        if file.name != "manifest.json":
            (elsewhere / file.name).write_bytes(file.read_bytes())
    pipeline(*settings(world, run="theirs"), "recipe=recover", f"model.start={elsewhere}", cwd=world)
    first, second = (open_checkpoint(folder) for folder in sorted((world / "artifacts").glob("distill-*")))
    assert first.folder != second.folder and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (world / "runs/theirs/evaluation.json").is_file()


def test_a_dry_run_answers_for_the_student_that_is_given(world, tmp_path, capsys):
    save_tiny(tiny_model("llama-tied", dtype=torch.float32, num_hidden_layers=2), tmp_path / "given")
    chosen = ("recipe=recover", "dry_run=true", "device/chip=910B1", "device.kind=cpu", "artifacts=" + str(tmp_path))
    found = made(world, *chosen, f"model.start={tmp_path / 'given'}")
    assert set(found) == {"teacher", "start"} and "recovery needs 1 x " in capsys.readouterr().out


@pytest.mark.parametrize("own", [False, True])
def test_a_student_without_a_tokenizer_gets_the_teachers_and_one_with_its_own_keeps_it(world, tmp_path, own):
    given = tmp_path / "given"
    save_tiny(tiny_model("llama-tied", dtype=torch.float32, num_hidden_layers=2), given)
    (given / "generation_config.json").write_text('{"max_new_tokens": 7}')
    if own:
        (given / "tokenizer.json").write_text("its own")
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    found = made(world, "recipe=recover", f"model.start={given}", "stages=[external_student]")["initial_student"]
    assert (found / "generation_config.json").read_text() == '{"max_new_tokens": 7}'
    there = {path.name: path.read_bytes() for path in found.glob("tokeniz*")}
    teachers = {path.name: path.read_bytes() for path in (world / "model").glob("tokeniz*")}
    assert len(teachers) > 1 and there == ({"tokenizer.json": b"its own"} if own else teachers)
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before


def test_what_cannot_be_adopted_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="model.start is not set"):
        made(world, "recipe=recover")
    with pytest.raises(ValueError, match="model.start: .* does not exist"):
        made(world, "recipe=recover", f"model.start={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="recipe.stages has no adopt"):
        made(world, f"model.start={world / 'model'}")
    save_tiny(tiny_model("llama-tied", dtype=torch.float32, vocab_size=40), tmp_path / "other")
    with pytest.raises(ValueError, match="needs one vocabulary"):
        made(world, "recipe=recover", f"model.start={tmp_path / 'other'}")
