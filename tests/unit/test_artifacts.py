"""Artifacts: digests, publishing, finding, damage, locks, the human view."""

import json
import os
import shutil
import socket
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import xxhash

from pipeline.runner import STAGES, key_of
from pipeline.runtime.artifacts import Store
from pipeline.runtime.disk import need_space
from pipeline.runtime.hashing import BLOCK, digest, file_digest, fingerprint
from pipeline.runtime.lock import Lock
from pipeline.runtime.manifest import damage
from pipeline.runtime.ranks import Ranks

FACTS = {"settings": {"tokens": 3}, "inputs": {"teacher": "teacher-0123456789ab"}, "seconds": 1.5, "peak_memory": 10}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "artifacts", Ranks(0, 1, 0), "r1")


def make(store, stage="score", key="aa", text="content"):
    with store.open(stage, key) as partial:
        (partial / "inner").mkdir(exist_ok=True)
        (partial / "scores.txt").write_text(text)
        (partial / "inner" / "more.txt").write_text("more")
        return store.publish(stage, key, **FACTS)


def test_a_digest_knows_values_and_not_their_order():
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest([1, 2]) != digest([2, 1])
    assert len(digest({})) == 12


def test_a_stage_that_makes_something_else_of_the_same_settings_names_it_anew():
    keys = {key_of(replace(STAGES["cut"], revision=number), {"a": 1}, {}) for number in (1, 2, 3)}
    assert len(keys) == 3
    assert STAGES["evaluate_reference"].revision == STAGES["evaluate"].revision > 1


@pytest.mark.parametrize("value", [{"a": object()}, float("nan"), {"a": {1, 2}}])
def test_a_digest_refuses_what_json_cannot_hold(value):
    with pytest.raises(ValueError):
        digest(value)


def test_a_published_artifact_is_found_with_a_manifest_of_every_file(store):
    folder = make(store)
    assert store.find("score", "aa") == folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"scores.txt", "inner/more.txt"}
    assert manifest["files"]["scores.txt"]["bytes"] == 7
    assert manifest["files"]["scores.txt"]["xxh3_128"] == xxhash.xxh3_128_hexdigest(b"content")
    assert {name: manifest[name] for name in FACTS} == FACTS
    assert (manifest["stage"], manifest["digest"], manifest["revision"]) == ("score", "aa", "r1")
    assert "torch" in manifest["libraries"]


def test_nothing_is_found_before_it_is_published(store):
    with store.open("score", "aa") as partial:
        (partial / "scores.txt").write_text("half")
        assert store.find("score", "aa") is None
    assert store.find("score", "aa") is None


def test_unpublished_work_is_found_again_by_the_next_attempt(store):
    with store.open("score", "aa") as partial:
        (partial / "half.txt").write_text("half")
    with store.open("score", "aa") as again:
        assert again == partial
        assert (again / "half.txt").read_text() == "half"


def test_unpublished_work_can_be_dropped(store):
    with store.open("score", "aa") as partial:
        (partial / "half.txt").write_text("half")
    with store.open("score", "aa", keep=False) as again:
        assert list(again.iterdir()) == []


def test_other_settings_never_touch_earlier_work(store):
    first, second = make(store, key="aa"), make(store, key="bb", text="other")
    assert (first / "scores.txt").read_text() == "content"
    assert (second / "scores.txt").read_text() == "other"


def test_a_stage_that_made_nothing_is_refused(store):
    with pytest.raises(ValueError, match="stage score made nothing"), store.open("score", "aa"):
        store.publish("score", "aa", **FACTS)


def test_an_artifact_published_meanwhile_is_not_made_again(store):
    make(store)
    with store.open("score", "aa") as partial:
        assert partial is None


def cut_short(folder):
    (folder / "scores.txt").write_text("con")


def lose_a_file(folder):
    (folder / "inner" / "more.txt").unlink()


def break_the_manifest(folder):
    (folder / "manifest.json").write_text('{"files":')


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


def empty_the_manifest(folder):
    (folder / "manifest.json").write_text('{"files": {}}')


def change_a_byte(folder):
    (folder / "scores.txt").write_text("contenT")


def change_the_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"seconds": 1.5', '"seconds": 1.25'))


def add_a_file(folder):
    (folder / "inner" / "model-2.safetensors").write_text("of another model")


HARMS = [
    cut_short,
    lose_a_file,
    break_the_manifest,
    lose_the_manifest,
    empty_the_manifest,
    change_a_byte,
    change_the_manifest,
    add_a_file,
]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_artifact_is_reported_not_used_and_made_anew(store, harm, capsys):
    folder = make(store)
    harm(folder)
    assert damage(folder, content=True) is not None
    assert store.find("score", "aa") is None
    assert f"{folder} is damaged and not used" in capsys.readouterr().out
    make(store)
    assert store.find("score", "aa") == folder
    assert len(list((store.root / ".damaged").iterdir())) == 1


def test_no_lock_or_partial_folder_is_left_behind(store):
    make(store)
    assert list((store.root / ".partial").iterdir()) == []


def test_a_second_owner_says_once_whom_it_waits_for_and_takes_the_lock_when_it_is_given_back(tmp_path, monkeypatch):
    heard, looks = [], []
    first, second = Lock(tmp_path / "x.lock"), Lock(tmp_path / "x.lock")

    def look(seconds):
        looks.append(seconds)
        if len(looks) == 100:
            first.release()

    monkeypatch.setattr(time, "sleep", look)
    first.acquire(heard.append)
    second.acquire(heard.append)
    assert len(looks) == 100
    assert heard == [f"process {os.getpid()} on {socket.gethostname()}"]
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_the_seconds_of_an_artifact_are_those_of_all_attempts_that_it_took(store, monkeypatch):
    """An attempt that was cut off lasted from its beginning to the last file that it wrote."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "time", lambda: clock.now)
    for begins, lasts in ((1000.0, 40.0), (5000.0, 2.5), (7000.0, None)):  # the last is cut off before any file
        clock.now = begins
        with store.open("score", "aa") as partial:
            if lasts:
                (partial / "half.txt").write_text("half")
                os.utime(partial / "half.txt", (begins + lasts, begins + lasts))
    clock.now = 9000.0
    folder = make(store)
    result = json.loads((folder / "manifest.json").read_text())
    assert result["seconds"] == FACTS["seconds"] + 40.0 + 2.5
    assert not list(folder.glob(".*")) and not any("clock" in name for name in result["files"])
    with store.open("score", "bb", keep=False) as partial:
        (partial / "half.txt").write_text("half")
    with store.open("score", "bb", keep=False) as partial:
        (partial / "scores.txt").write_text("again")
        assert json.loads((store.publish("score", "bb", **FACTS) / "manifest.json").read_text())["seconds"] == 1.5


def test_what_an_earlier_attempt_left_is_a_part_of_the_disk_that_is_needed(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights").write_bytes(b"x" * 10**6)
    (tmp_path / "teacher").symlink_to(tmp_path / "checkpoints" / "weights")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    need_space(tmp_path, 2 * 10**6)
    with pytest.raises(ValueError, match="needs 2.1 MB and its disk has 2.0 MB"):
        need_space(tmp_path, 2_100_000)


def test_a_fingerprint_sees_names_sizes_and_bytes_and_not_where_the_folder_is(tmp_path):
    folder = tmp_path / "model"
    (folder / ".cache").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    first = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (folder / ".cache" / "note").write_text("hidden files do not count")
    assert fingerprint(folder) == fingerprint(tmp_path / "copy") == first
    (folder / "model.safetensors").write_bytes(b"x" * 500 + b"y" + b"x" * 499)
    assert fingerprint(folder) != first
    with pytest.raises(ValueError, match="does not exist"):
        fingerprint(tmp_path / "nowhere")


def test_every_byte_of_a_large_file_counts(tmp_path):
    weights = tmp_path / "model.safetensors"
    size = 3 * BLOCK + 1
    weights.write_bytes(bytes(size))
    seen = {fingerprint(weights)}
    places = (0, BLOCK - 1, BLOCK, 2 * BLOCK + 77, size - 1)
    for place in places:
        data = bytearray(size)
        data[place] = 1
        weights.write_bytes(data)
        seen.add(fingerprint(weights))
    assert len(seen) == len(places) + 1


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path, reads = tmp_path / "weights", []
    path.write_bytes(b"x" * 100)
    os.utime(path, (1000, 1000))
    made = xxhash.xxh3_128
    monkeypatch.setattr(xxhash, "xxh3_128", lambda: reads.append(1) or made())
    first = file_digest(path)
    assert file_digest(path) == first and len(reads) == 1
    path.write_bytes(b"x" * 99 + b"y")  # just written: it may change again within one tick of the file system's clock
    changed = file_digest(path)
    assert changed != first and file_digest(path) == changed and len(reads) == 3


def test_sizes_alone_can_be_compared(store):
    folder = make(store)
    change_a_byte(folder)
    assert replace(store, verify="size").find("score", "aa") == folder
    assert store.find("score", "aa") is None
    cut_short(folder)
    assert replace(store, verify="size").find("score", "aa") is None


def test_a_link_is_compared_by_what_it_leads_to(store, tmp_path):
    source = tmp_path / "source"
    source.write_text("one")
    with store.open("teacher", "aa") as partial:
        (partial / "model").symlink_to(source)
        folder = store.publish("teacher", "aa", **FACTS)
    assert store.find("teacher", "aa") == folder
    source.write_text("two")
    assert store.find("teacher", "aa") is None
    source.unlink()
    assert store.find("teacher", "aa") is None


def test_too_little_disk_is_refused_before_work(tmp_path):
    need_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(ValueError, match="needs 1000000000.0 GB and its disk has"):
        need_space(tmp_path / "not" / "yet", 10**18)
