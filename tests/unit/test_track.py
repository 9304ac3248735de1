"""Tracking with the real W&B, offline: what it records, where, and that a second run continues the first."""

import contextlib
import io
import json
import os
import time
from pathlib import Path

import psutil
import pytest
import wandb
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from pipeline.runtime.track import accepted, logged_in, open_track, run_id
from tests.processes import on_ranks

CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An account that never used W&B; what W&B reads from the environment is put back afterwards."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("NETRC", raising=False)
    for name in (*CREDENTIALS, "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_SILENT", "WANDB_SERVICE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return folder


def opened(folder, mode="offline", config=None, rank=0):
    config = {"shape": {"layers": 4}} if config is None else config
    return open_track(mode, "project", None, "sweep", ["tag"], "demo", folder, config, rank)


def records(path: Path) -> list[Record]:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    data, place, found, partial = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        partial += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            found.append(Record.FromString(partial))
            partial = b""
    return found


def history(found: list[Record]) -> list[dict]:
    """Logged rows without W&B's own fields."""
    rows = []
    for record in found:
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if items:
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


def recorded(folder: Path) -> list[list[Record]]:
    """The records of each offline run in a folder, oldest first, when W&B's own process has written the last."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        deadline = time.monotonic() + 20
        while not any(record.HasField("exit") for record in records(path)) and time.monotonic() < deadline:
            time.sleep(0.05)
        found.append(records(path))
    return found


@pytest.fixture
def one(tmp_path):
    """A finished offline run with two stages, a result, a picture and an artifact, in one folder."""
    folder, blueprint, picture = tmp_path / "runs" / "demo", tmp_path / "blueprint.json", tmp_path / "sizes.png"
    blueprint.write_text("{}")
    Image.new("RGB", (4, 4)).save(picture)
    track = opened(folder)
    track.log({"loss": 2.5, "rate": 0.1}, 3, "distill")
    track.log({"loss": 1.5}, 4, "distill")
    track.log({"tokens": 10.0}, 1, "score")
    track.log({"perplexity": 9.0}, None, "evaluate")
    track.image(picture, "figures/sizes")
    track.artifact(blueprint, "blueprint", "blueprint")
    track.finish()
    return folder


def test_an_offline_run_holds_all_that_was_recorded(one, home, tmp_path):
    [found] = recorded(one)
    run = next(record.run for record in found if record.run.run_id)
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("project", "demo", "sweep", ["tag"])
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["shape"] == {"layers": 4}

    rows = history(found)
    assert rows[:3] == [
        {"distill/loss": 2.5, "distill/rate": 0.1, "distill/step": 3},
        {"distill/loss": 1.5, "distill/step": 4},
        {"score/tokens": 10.0, "score/step": 1},
    ]
    assert any(name.startswith("figures/sizes") for name in rows[3])

    axes = {record.metric.glob_name: record.metric.step_metric for record in found if record.metric.glob_name}
    assert axes == {"distill/*": "distill/step", "score/*": "score/step"}

    results = {item.key: json.loads(item.value_json) for record in found for item in record.summary.update}
    assert results["evaluate/perplexity"] == 9.0

    kept = [(record.artifact.name, record.artifact.type) for record in found if record.artifact.name]
    assert kept == [("blueprint", "blueprint")]
    assert next(record.exit.exit_code for record in found if record.HasField("exit")) == 0

    assert list(home.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"home", "runs", "blueprint.json", "sizes.png"}
    assert {path.name for path in one.iterdir()} == {"wandb", "wandb_id.json"}


NAMES = [
    "demo-blueprint",
    "sweep/shape.hidden=448-report",
    "sweep/shape.hidden=448,plan.clap=true-report",
    "sweep-shape.hidden-448-report",
    "sweep/shape:hidden=448-report",
    "a name of words",
    "größe",
    "line\nbreak",
    "",
    "x" * 128,
    "x" * 129,
    "x" * 130,
]


def test_any_name_becomes_one_that_wandb_accepts_and_different_names_stay_different():
    given = [accepted(name) for name in NAMES]
    assert len(set(given)) == len(NAMES) and given == [accepted(name) for name in NAMES]
    for result in given:
        assert wandb.Artifact(result, "report").name.startswith(result) and len(result) <= 128
        assert accepted(result) == result
    assert (given[0], given[9]) == (NAMES[0], NAMES[9])
    with pytest.raises(ValueError):
        wandb.Artifact(NAMES[1], "report")


@pytest.mark.slow
def test_running_again_continues_the_run_and_another_configuration_starts_one(tmp_path):
    same, other = {"seed": 1}, {"seed": 2}
    first = run_id(tmp_path, same)
    assert run_id(tmp_path, same) == first
    assert run_id(tmp_path, other) != first
    folder = tmp_path / "runs" / "demo"
    for step in (1, 2):
        track = opened(folder)
        track.log({"loss": 1.0}, step, "distill")
        track.finish(failed=step == 1)
        time.sleep(1.1)  # W&B names an offline run's folder by the second
    found = recorded(folder)
    ids = [next(record.run.run_id for record in part if record.run.run_id) for part in found]
    assert len(ids) == 2 and ids[0] == ids[1]
    assert [history(part) for part in found] == [[{"distill/loss": 1.0, "distill/step": step}] for step in (1, 2)]
    assert [next(record.exit.exit_code for record in part if record.HasField("exit")) for part in found] == [1, 0]


@pytest.mark.parametrize("mode, rank", [("disabled", 0), ("offline", 1)])
def test_a_disabled_track_and_other_ranks_write_nothing(tmp_path, mode, rank):
    track = opened(tmp_path / "runs", mode=mode, rank=rank)
    track.log({"loss": 1.0}, 1, "distill")
    track.artifact(tmp_path / "nowhere", "blueprint", "blueprint")
    track.image(tmp_path / "nowhere", "figure")
    track.finish()
    assert not (tmp_path / "runs").exists()


def test_online_without_credentials_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="track.mode is online without W&B credentials; run `wandb login`"):
        opened(tmp_path / "runs", mode="online")
    assert not (tmp_path / "runs").exists()


def test_the_environment_chooses_where_the_mode_is_auto(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    opened(tmp_path / "runs", mode="auto").finish()
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with pytest.raises(ValueError, match="WANDB_MODE is 'sideways'"):
        opened(tmp_path / "runs", mode="auto")


def test_credentials_are_seen_without_a_network(home, monkeypatch):
    assert not logged_in()
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (home / ".netrc").chmod(0o600)
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert logged_in()


def spoken(work) -> str:
    """What the work prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        work()
    return output.getvalue()


def without_a_network(_, folder: str) -> str:
    os.environ.update({"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"})
    os.environ |= {f"WANDB__GRAPHQL_RETRY_WAIT_{each}_SECONDS": "0.1" for each in ("MIN", "MAX")}

    def work():
        track = opened(Path(folder), mode="auto")
        track.log({"loss": 1.0}, 1, "distill")
        track.finish()

    return spoken(work)


@pytest.mark.slow
def test_credentials_without_a_network_end_offline_and_say_so(tmp_path):
    [text] = on_ranks(without_a_network, tmp_path, world=1, arguments=(str(tmp_path / "runs"),))
    assert "W&B cannot be used online: " in text and "W&B: offline; upload with `wandb sync" in text
    assert [history(part) for part in recorded(tmp_path / "runs")] == [[{"distill/loss": 1.0, "distill/step": 1}]]


def losing_the_process(_, folder: str) -> str:
    def work():
        track = opened(Path(folder))
        track.log({"loss": 1.0}, 1, "distill")
        children = psutil.Process().children(recursive=True)
        assert children
        for child in children:
            child.kill()
        psutil.wait_procs(children)
        for step in range(2, 12):
            track.log({"loss": 1.0}, step, "distill")
            time.sleep(0.05)
        track.finish()

    return spoken(work)


@pytest.mark.slow
def test_losing_the_process_of_wandb_does_not_end_the_training(tmp_path):
    [text] = on_ranks(losing_the_process, tmp_path, world=1, arguments=(str(tmp_path / "runs"),))
    assert text.count("W&B stopped") == 1, text
