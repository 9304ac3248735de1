"""The run folder: links that follow the run, and a student and report that are real files."""

import ctypes
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.runtime import deliver as delivering
from pipeline.runtime.artifacts import Store
from pipeline.runtime.clean import unused
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.records import read_record
from pipeline.runtime.run_folder import Shown, artifacts_of, check_output, check_places, show
from tests.stores import exported, linked, make, of, student
from tests.watching import calls_of


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "artifacts", Ranks(0, 1, 0), "r1")


def test_the_view_links_to_artifacts_and_follows_newer_ones(tmp_path, store):
    first, second = make(store), make(store, key="b" * 12, text="other")
    shown = {"scores": linked(first), "text": linked(first, "scores.txt")}
    view = show(tmp_path / "runs", "sweep/one", of(first), shown)
    assert (view / "scores" / "scores.txt").read_text() == (view / "text").read_text() == "content"
    show(tmp_path / "runs", "sweep/one", of(second), {"scores": linked(second)})
    assert (view / "scores" / "scores.txt").read_text() == "other"
    assert read_record(view / "run.json") == of(second) | {"delivered": {}}
    assert {path.name for path in view.iterdir()} == {"run.json", "scores"}


def test_the_view_is_of_one_run_and_no_file_is_lost(tmp_path, store):
    score, old, new = make(store), make(store, "layer_loss", "b" * 12), make(store, "layer_loss", "c" * 12)
    runs, notes = tmp_path / "runs", tmp_path / "notes"
    notes.write_text("mine")
    for name in ("one", "one/rounds/1"):
        view = show(runs, name, of(score, old), {"scores": linked(score), "depth.json": linked(old, "scores.txt")})
    view = runs / "one"
    (view / "wandb").mkdir()
    (view / "wandb" / "latest").symlink_to(old)
    (view / "notes").symlink_to(notes)
    (view / "main.log").write_text("a log")
    show(runs, "one", of(score), {"scores": linked(score)})  # another run of that name, at an early stage
    kept = {"run.json", "scores", "rounds", "wandb", "notes", "main.log"}
    assert {path.name for path in view.iterdir()} == kept
    assert {path.name for path in (view / "rounds" / "1").iterdir()} == {"run.json", "scores"}
    assert (view / "wandb" / "latest" / "scores.txt").read_text() == "content"
    show(runs, "one", of(score, new), {})
    assert {path.name for path in view.iterdir()} == kept and (old / "scores.txt").exists()


def test_the_view_and_its_artifacts_can_be_moved_together(tmp_path, store):
    scores = make(store)
    view = show(tmp_path / "runs", "one", of(scores), {"scores": linked(scores)})
    home = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(home)
    assert (home / view.relative_to(tmp_path) / "scores" / "scores.txt").read_text() == "content"
    home.rename(tmp_path)


def test_a_link_does_not_replace_what_the_view_did_not_make(tmp_path, store):
    (tmp_path / "runs" / "one" / "scores").mkdir(parents=True)
    scores = make(store)
    with pytest.raises(ValueError, match="is in the way"):
        show(tmp_path / "runs", "one", of(scores), {"scores": linked(scores)})


def test_the_student_and_the_report_outlive_the_artifacts_and_travel_alone(tmp_path, store):
    made, report = exported(store, size=delivering.LARGE), make(store, "report", "f" * 12)
    shown = student(made) | {"report.html": Shown(report, "scores.txt", True), "figures": Shown(report, "inner", True)}
    view = show(tmp_path / "runs", "one", of(made, report), shown)
    assert not any(path.is_symlink() for path in view.rglob("*"))
    assert {path.name for path in (view / "student").iterdir()} == {"config.json", "model.safetensors"}
    assert (view / "student/model.safetensors").samefile(made / "model.safetensors")
    assert not (view / "student/config.json").samefile(made / "config.json")
    weights = (made / "model.safetensors").read_bytes()
    shutil.rmtree(store.root)
    with tarfile.open(tmp_path / "run.tar", "w") as archive:
        archive.add(view, "one")
    with tarfile.open(tmp_path / "run.tar") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    there = tmp_path / "there/one"
    assert (there / "student/model.safetensors").read_bytes() == weights
    assert (there / "report.html").read_text() == "content" and (there / "figures/more.txt").read_text() == "more"


def test_without_hard_links_the_student_is_copied(tmp_path, store, monkeypatch):
    def refuse(*_):
        raise OSError("no links across disks")

    made = exported(store, size=delivering.LARGE)
    monkeypatch.setattr(os, "link", refuse)
    view = show(tmp_path / "runs", "one", of(made), student(made))
    assert (view / "student/model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert (view / "student/model.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize("atomic", [True, False])
def test_an_old_student_stays_until_the_new_one_is_complete(tmp_path, store, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: None)
    old, new = exported(store), exported(store, "f" * 12, "better")
    view = show(tmp_path / "runs", "one", of(old), student(old))
    show(tmp_path / "runs", "one", of(make(store)), {})
    assert (view / "student/model.safetensors").read_text() == "weights"
    assert read_record(view / "run.json")["delivered"]["student"]["artifact"] == old.name
    show(tmp_path / "runs", "one", of(new), student(new))
    assert (view / "student/model.safetensors").read_text() == "better"
    assert {path.name for path in view.iterdir()} == {"run.json", "student"}


def test_a_student_that_is_in_place_is_not_written_again(tmp_path, store, monkeypatch):
    made = exported(store)
    view = show(tmp_path / "runs", "one", of(made), student(made))
    before = (view / "student").stat().st_ino
    show(tmp_path / "runs", "one", of(made), student(made))
    assert (view / "student").stat().st_ino == before


def add(view):
    (view / "student/notes.md").write_text("mine")


def edit(view):
    (view / "student/config.json").write_text('{"mine": 1}')


def lose_the_record(view):
    (view / "run.json").write_text("{")


@pytest.mark.parametrize("change", [add, edit, lose_the_record])
@pytest.mark.parametrize("text", ["weights", "better"])
def test_a_student_that_was_changed_is_kept_beside_the_new_one(tmp_path, store, change, text, capsys):
    old, new = exported(store), exported(store, "f" * 12, text)
    view = show(tmp_path / "runs", "one", of(old), student(old))
    change(view)
    before = {path.name: path.read_text() for path in (view / "student").iterdir()}
    show(tmp_path / "runs", "one", of(new), student(new))
    assert {path.name: path.read_text() for path in (view / "student").iterdir()} == {
        "config.json": "{}",
        "model.safetensors": text,
    }
    if change is lose_the_record and text == "weights":  # as it should be: it is not written again
        return
    assert {path.name: path.read_text() for path in (view / "student-1").iterdir()} == before
    assert str(view / "student-1") in capsys.readouterr().out


def test_what_a_killed_process_left_is_recognised_and_removed(tmp_path, store, capsys):
    old, new = exported(store), exported(store, "f" * 12, "better")
    view = show(tmp_path / "runs", "one", of(old), student(old))

    class Killed(Exception):
        pass

    for step in (delivering._copy, delivering._exchange):
        with pytest.raises(Killed), calls_of(step, Killed(), at=1):
            show(tmp_path / "runs", "one", of(new), student(new))
        assert (view / "student/model.safetensors").read_text() == "weights"
    (view / ".student.99999").mkdir()
    show(tmp_path / "runs", "one", of(new), student(new))
    assert (view / "student/model.safetensors").read_text() == "better"
    assert {path.name for path in view.iterdir()} == {"run.json", "student"}
    assert capsys.readouterr().out == ""


def test_the_student_can_be_put_elsewhere(tmp_path, store):
    old, new = exported(store), exported(store, "f" * 12, "better")
    runs, output = tmp_path / "runs", tmp_path / "models" / "small"
    check_output(runs, "one", output)
    for made, text in ((old, "weights"), (new, "better")):
        view = show(runs, "one", of(made), student(made), output)
        assert (output / "model.safetensors").read_text() == text and not output.is_symlink()
        assert (view / "student").is_symlink() and (view / "student").samefile(output)
        check_output(runs, "one", output)
    assert [path.name for path in output.parent.iterdir()] == ["small"]
    with pytest.raises(ValueError, match=r"^output: "):
        check_output(runs, "two", output)
    (output / "config.json").write_text("mine")
    with pytest.raises(ValueError, match=r"^output: "):
        check_output(runs, "one", output)
    with pytest.raises(ValueError, match=r"^output: .* mount point"):
        check_output(runs, "one", Path("/"))
    view = show(runs, "one", of(new), student(new))  # back into the run folder
    assert not (view / "student").is_symlink() and (output / "config.json").read_text() == "mine"


def test_a_damaged_record_is_a_fault_where_it_matters_and_written_anew_elsewhere(tmp_path, store):
    made = make(store)
    view = show(tmp_path / "runs", "one", of(made), {"scores": linked(made)})
    assert artifacts_of(view) == {made.name}
    text = (view / "run.json").read_text()
    for harmed in ("", "[]", "{", "{}", text.replace("score-a", "score-b"), text[:-1], text + " "):
        (view / "run.json").write_text(harmed)
        with pytest.raises(ValueError, match="run.json"):
            artifacts_of(view)
        with pytest.raises(ValueError, match="run.json"):
            unused([tmp_path / "runs"], store.root)
    show(tmp_path / "runs", "one", of(made), {"scores": linked(made)})
    assert artifacts_of(view) == {made.name}


def test_verification_detects_weights_that_were_edited_through_the_student(tmp_path, store):
    made = exported(store, size=delivering.LARGE)
    view = show(tmp_path / "runs", "one", of(made), student(made))
    with (view / "student/model.safetensors").open("r+b") as file:
        file.write(b"W")
    assert store.find("export", "e" * 12) is None
    assert replace(store, verify="size").find("export", "e" * 12) == made


def test_a_file_of_another_artifact_is_added_to_the_delivered_student(tmp_path, store):
    made, report = exported(store, size=2 << 20), make(store, "report", "c" * 12, text="card")
    view = show(tmp_path / "runs", "one", of(made), student(made))
    assert not (view / "student/README.md").exists()
    shown = student(made) | {"student/README.md": Shown(report, "scores.txt", delivered=True)}
    show(tmp_path / "runs", "one", of(made, report), shown)
    assert (view / "student/README.md").read_text() == "card"
    assert (view / "student/model.safetensors").samefile(made / "model.safetensors")
    assert not (made / "README.md").exists()
    assert {path.name for path in view.iterdir()} == {"run.json", "student"}
    before = (view / "student").stat().st_ino
    show(tmp_path / "runs", "one", of(made, report), shown)
    assert (view / "student").stat().st_ino == before
    newer = make(store, "report", "d" * 12, text="newer")
    output = tmp_path / "elsewhere"
    shown = student(made) | {"student/README.md": Shown(newer, "scores.txt", delivered=True)}
    view = show(tmp_path / "runs", "two", of(made, newer), shown, output)
    assert (output / "README.md").read_text() == "newer"
    assert artifacts_of(view) == {made.name, newer.name}


def test_folders_that_hold_each_other_are_refused_before_any_work(tmp_path, store):
    made, runs, artifacts = exported(store), tmp_path / "runs", tmp_path / "artifacts"
    show(runs, "sweep/one", of(made), student(made) | {"scores": linked(made)})
    check_places(runs, "sweep/two", artifacts, str(tmp_path / "models"))
    check_places(runs, "sweep/one", artifacts, None)
    for name, reason in (("sweep/one/rounds", "a run"), ("sweep/one/scores", "a link"), ("sweep/link", "a link")):
        (runs / "sweep" / "link").unlink(missing_ok=True)
        (runs / "sweep" / "link").symlink_to(made)
        with pytest.raises(ValueError, match=f"^run: {name} lies in .*{reason}"):
            check_places(runs, name, artifacts, None)
    around = (tmp_path, runs, artifacts, runs / "sweep" / "one")
    for output in (*around, artifacts / "new", runs / "sweep" / "one" / "student"):
        word = r" holds (artifacts|runs|the run folder) " if output in around else " is where "
        with pytest.raises(ValueError, match=rf"^output: .*{word}"):
            check_places(runs, "sweep/one", artifacts, str(output))
