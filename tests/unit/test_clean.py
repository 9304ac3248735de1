"""The command clean: artifacts that no run folder refers to are shown, and deleted on request."""

import os

import pytest

from pipeline.runtime import deliver as delivering
from pipeline.runtime.artifacts import Store
from pipeline.runtime.clean import clean, unused
from pipeline.runtime.lock import Lock
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.run_folder import show, write_record
from tests.stores import FACTS, exported, make, of, student


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "artifacts", Ranks(0, 1, 0), "r1")


@pytest.fixture
def used(tmp_path, store):
    """Return a store and runs of which the artifacts named `kept` are used and those named `free` are not."""
    source = make(store, "teacher", "1" * 12)
    made = make(store, "cut", "2" * 12, inputs=[source.name])
    behind = make(store, "cut", "3" * 12)
    with store.open("teacher", "4" * 12) as partial:
        (partial / "model").symlink_to(behind / "scores.txt")
        links = store.publish("teacher", "4" * 12, **FACTS)
    early = make(store, "shape_search", "5" * 12)
    free = [make(store, "layer_loss", "6" * 12, "x" * 2000000)]
    for key in ("7" * 12, "8" * 12):
        with store.open("distill", key) as partial:
            (partial / "checkpoint").write_text("x" * 1000)
    free.append(store.root / ".partial" / f"distill-{'8' * 12}")
    (store.root / ".partial" / f"cut-{'2' * 12}.lock").write_text("process 1 on a host that is gone")
    harmed = store.root / ".damaged" / f"cut-{'9' * 12}-123"
    harmed.mkdir(parents=True)
    free.append(harmed)
    record = of(made, links) | {"unfinished": [f"distill-{'7' * 12}"], "earlier": [early.name]}
    write_record(tmp_path / "runs" / "sweep" / "one", record)
    return store, tmp_path / "runs", {source, made, behind, links, early}, free


def test_what_no_run_folder_refers_to_is_shown_and_deleted_on_request(used, capsys):
    store, runs, kept, free = used
    arguments = [f"runs={runs}", f"artifacts={store.root}"]
    assert [each.folder for each in unused([runs], store.root)] == free
    assert clean(arguments) == 1 and all(folder.exists() for folder in free)
    shown = capsys.readouterr().out
    assert all(str(folder) in shown for folder in free) and "2.0 MB" in shown and "--yes" in shown
    assert clean([*arguments, "--yes"]) == 0
    assert not any(folder.exists() for folder in free) and all(folder.exists() for folder in kept)
    assert [path.name for path in (store.root / ".partial").iterdir()] == [f"distill-{'7' * 12}"]
    assert clean([*arguments, "--yes"]) == 0 and "nothing to delete" in capsys.readouterr().out


def test_a_run_named_like_an_artifact_is_not_deleted(tmp_path, store):
    view = store.root / f"exp-{'a' * 12}"
    write_record(view, of(make(store)))
    assert unused([store.root], store.root) == []


def test_what_a_process_works_on_is_not_deleted(used, capsys):
    store, runs, _, free = used
    lock = Lock(free[1].with_name(free[1].name + ".lock"))
    assert lock.try_acquire()
    assert clean([f"runs={runs}", f"artifacts={store.root}", "--yes"]) == 0
    assert free[1].exists() and not free[0].exists()
    lock.release()


def test_a_hard_link_is_counted_as_kept(tmp_path, store):
    made = exported(store, size=delivering.LARGE)
    view = show(tmp_path / "runs", "one", of(made), student(made))
    os.truncate(view / "run.json", 0)
    write_record(view, {"stages": {}})
    (found,) = unused([tmp_path / "runs"], store.root)
    assert found.folder == made and found.bytes < delivering.LARGE


@pytest.mark.parametrize("arguments", [["runz=x"], ["--force"], ["runs="], ["runs=nowhere"], ["artifacts=nowhere"]])
def test_a_mistake_in_the_command_deletes_nothing(used, arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, _, _, free = used
    assert clean(["--yes", *arguments]) == 2 and all(folder.exists() for folder in free)
    assert capsys.readouterr().err.startswith("error: ")
