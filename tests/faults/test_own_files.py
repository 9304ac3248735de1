"""Files of our own that are malformed, cut or flipped: detected every time, never a traceback, and made again."""

import json
import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.model.blueprint import Blueprint
from pipeline.model.shape import Trial
from pipeline.runtime.artifacts import CLOCK, Store
from pipeline.runtime.clean import clean
from pipeline.runtime.ledger import Ledger
from pipeline.runtime.lock import Lock
from pipeline.runtime.manifest import damage
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.records import load_record, read_record, save_record
from pipeline.runtime.run_folder import Shown, artifacts_of, check_output, show
from pipeline.runtime.track import run_id

FACTS = {"settings": {"tokens": 3}, "inputs": {}, "seconds": 1.5, "peak_memory": 10}
CASES = int(os.environ.get("PIPELINE_FUZZ_CASES", "60"))  # of each test; a long run: PIPELINE_FUZZ_CASES=20000
KEYS = st.sampled_from(["files", "value", "checksum", "stages", "delivered", "bytes", "xxh3_128", "marks", "id"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
TEXTS = st.one_of(
    JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=40),
    st.sampled_from([b"", b"{", b'{"files": {}}', b"[" * 100000, b'{"a":' * 3000, b"1" * 5000, b"\xff\xfe", b"null\n"]),
)
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "artifacts", Ranks(0, 1, 0), "r1")


def make(store, stage="score", key="a" * 12):
    with store.open(stage, key) as partial:
        if partial is None:
            return store.path(stage, key)
        (partial / "scores.json").write_text(json.dumps({"layers": [0.5, 1.25], "tokens": 3}))
        (partial / "weights.safetensors").write_bytes(bytes(range(256)) * 4)
        return store.publish(stage, key, **FACTS)


def flipped(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


HARMS = {
    "a flipped bit": flipped,
    "cut short": lambda data, draw: data[: draw.randrange(len(data))],
    "longer": lambda data, draw: data + draw.randbytes(draw.randint(1, 9)),
    "zeros": lambda data, draw: bytes(len(data)),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["manifest.json", "scores.json", "weights.safetensors"])
def test_every_harm_to_every_file_of_an_artifact_is_detected(store, harm, name):
    folder, draw = make(store), random.Random(harm + name)
    whole = (folder / name).read_bytes()
    detected = 0
    for _ in range(CASES):
        (folder / name).write_bytes(HARMS[harm](whole, draw))
        detected += damage(folder, content=True) is not None
    assert detected == CASES
    (folder / name).write_bytes(whole)
    assert damage(folder, content=True) is None


@pytest.mark.parametrize("harm", HARMS)
def test_every_harm_to_a_record_is_detected(tmp_path, harm):
    path, draw = tmp_path / "ledger.json", random.Random(harm)
    value = {"layers": {"0 1": 0.25, "0 2": 1e-9}, "text": "é"}
    save_record(path, value)
    whole = path.read_bytes()
    for _ in range(CASES):
        path.write_bytes(HARMS[harm](whole, draw))
        assert load_record(path, {}) == {}
    path.write_bytes(whole)
    assert load_record(path, {}) == value and load_record(path, []) == []


@fuzz
@given(JSON.filter(lambda value: value is not None))
def test_a_record_gives_back_what_was_saved(tmp_path, value):
    save_record(tmp_path / "record.json", {"it": value})
    again = load_record(tmp_path / "record.json", {})
    assert json.dumps(again, sort_keys=True) == json.dumps(json.loads(json.dumps({"it": value})), sort_keys=True)


@fuzz
@given(TEXTS)
def test_any_manifest_that_is_not_ours_is_damage_and_the_artifact_is_made_again(store, text):
    folder = make(store)
    (folder / "manifest.json").write_bytes(text)
    assert store.find("score", "a" * 12) is None
    make(store)
    assert store.find("score", "a" * 12) == folder


@fuzz
@given(TEXTS)
def test_any_clock_or_lock_file_leaves_the_stage_able_to_run(store, text):
    partial = store.root / ".partial" / f"score-{'b' * 12}"
    partial.mkdir(parents=True, exist_ok=True)
    (partial / CLOCK).write_bytes(text)
    partial.with_name(f"{partial.name}.lock").write_bytes(text)
    folder = make(store, key="b" * 12)
    assert read_record(folder / "manifest.json")["seconds"] >= FACTS["seconds"]
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@fuzz
@given(TEXTS)
def test_any_run_json_is_written_anew_and_stops_clean_from_deleting(store, tmp_path, text):
    made, runs = make(store), tmp_path / "runs"
    record = {"stages": {"score": {"artifact": made.name}}}
    shown = {"scores.json": Shown(made, "scores.json", delivered=True)}
    view = show(runs, "one", record, shown)
    (view / "run.json").write_bytes(text)
    with pytest.raises(ValueError, match="run.json"):
        artifacts_of(view)
    assert clean(["--yes", f"runs={runs}", f"artifacts={store.root}"]) == 2 and made.exists()
    with pytest.raises(ValueError, match="^output: "):
        check_output(runs, "one", view)
    show(runs, "one", record, shown)
    assert artifacts_of(view) == {made.name}


@fuzz
@given(TEXTS)
def test_any_note_of_a_tracked_run_gives_an_id(tmp_path, text):
    (tmp_path / "wandb_id.json").write_bytes(text)
    first = run_id(tmp_path, {"a": 1})
    assert isinstance(first, str) and run_id(tmp_path, {"a": 1}) == first


@fuzz
@given(TEXTS)
def test_any_blueprint_is_a_clear_error(tmp_path, text):
    path = tmp_path / "blueprint.json"
    path.write_bytes(text)
    with pytest.raises(ValueError):
        Blueprint.load(tmp_path)


@pytest.mark.parametrize("harm", [*HARMS, "a line of another kind"])
def test_a_ledger_keeps_what_was_finished_before_its_first_damaged_line(tmp_path, harm, capsys):
    path, draw = tmp_path / "ledger.jsonl", random.Random(harm)
    for number in range(5):
        Ledger(path, Trial).append(Trial((0, number), number / 3))
    lines = path.read_bytes().splitlines(keepends=True)
    for _ in range(CASES):
        number = draw.randrange(5)
        line = HARMS[harm](lines[number], draw) if harm in HARMS else b'{"kept": [0], "loss": 1.0}\n'
        path.write_bytes(b"".join([*lines[:number], line, *lines[number + 1 :]]))
        entries = Ledger(path, Trial).entries
        whole = number + (harm == "longer")  # what follows a line is not of that line
        assert entries == [Trial((0, each), each / 3) for each in range(whole)]
        Ledger(path, Trial).append(Trial((9,), 9.0))
        assert Ledger(path, Trial).entries == [*entries, Trial((9,), 9.0)]
    assert "is damaged" in capsys.readouterr().out


@fuzz
@given(TEXTS)
def test_any_ledger_begins_anew(tmp_path, text):
    (tmp_path / "ledger.jsonl").write_bytes(text)
    assert Ledger(tmp_path / "ledger.jsonl", Trial).entries == []
    assert (tmp_path / "ledger.jsonl").read_bytes() == b""


@pytest.mark.parametrize("text", [b"\x00" * 50, b"process 1\non another\nhost\x1b[2J", b"\xff" * 300, b""])
def test_the_owner_of_a_lock_is_one_line_whatever_its_file_holds(tmp_path, text, monkeypatch):
    held, waiting, owners = Lock(tmp_path / "x.lock"), Lock(tmp_path / "x.lock"), []
    assert held.try_acquire()
    held.path.write_bytes(text)

    def look(_):
        held.release()

    monkeypatch.setattr(time, "sleep", look)
    waiting.acquire(owners.append)
    assert len(owners) == 1 and owners[0] and owners[0].isprintable() and len(owners[0]) <= 100
    waiting.release()


@pytest.mark.parametrize("jump", [-1e9, -3600.0, 3600.0, 1e9])
def test_a_clock_that_jumps_leaves_the_artifact_and_its_seconds_sound(store, monkeypatch, jump):
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for step in (0.0, jump, 0.0):
        now[0] += step
        with store.open("score", "c" * 12) as partial:
            Path(partial / "half.txt").write_text("half")
            os.utime(partial / "half.txt", (now[0] + 5, now[0] + 5))
    folder = make(store, key="c" * 12)
    assert store.find("score", "c" * 12) == folder
    assert read_record(folder / "manifest.json")["seconds"] >= FACTS["seconds"]
