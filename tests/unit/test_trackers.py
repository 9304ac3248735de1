"""TensorBoard and MLflow behind the interface of the tracker, by their own readers; skipped where not installed."""

import importlib.util

import pytest

from pipeline.runtime.tracker import Track
from pipeline.runtime.trackers import check_tool, open_tracker

CONFIG = {"shape": {"layers": 4}, "seed": 0}


def opened(tool, folder, rank=0, mode="auto"):
    track = {"tool": tool, "mode": mode, "project": "project", "entity": None, "group": "sweep", "tags": ["tag"]}
    return open_tracker(track, "demo", folder, CONFIG, rank)


@pytest.fixture
def picture(tmp_path):
    from matplotlib.figure import Figure

    Figure(figsize=(1, 1)).savefig(tmp_path / "sizes.png")
    return tmp_path / "sizes.png"


def test_tensorboard_has_every_scalar_and_picture_also_of_a_continued_run(tmp_path, picture):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with opened("tensorboard", tmp_path / "run") as track:
        track.log({"loss": 2.5}, 3, "distill")
        track.image(picture, "figures/sizes")
        track.artifact(picture, "any name", "report")
    with opened("tensorboard", tmp_path / "run") as track:
        track.log({"loss": 1.5}, 4, "distill")
        track.log({"perplexity": 9.0}, None, "evaluate")
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in read.Scalars("distill/loss")] == [(3, 2.5), (4, 1.5)]
    assert read.Scalars("evaluate/perplexity")[0].value == 9.0 and read.Tags()["images"] == ["figures/sizes"]


def test_mlflow_continues_one_run_with_parameters_metrics_and_files(tmp_path, picture, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for step in (1, 2):
        with opened("mlflow", tmp_path / "run") as track:
            track.log({"loss": 3.0 - step}, step, "distill")
            track.artifact(picture, "any name", "report")
    client = tracking.MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert run.data.params == {"shape.layers": "4", "seed": "0"} and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "distill/loss")
    assert [(each.step, each.value) for each in history] == [(1, 2.0), (2, 1.0)]
    assert [each.path for each in client.list_artifacts(run.info.run_id, "report")] == ["report/sizes.png"]


@pytest.mark.parametrize("tool", ["tensorboard", "mlflow"])
def test_a_tool_that_is_not_installed_is_refused_by_its_setting(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"^track\.tool: {tool} is not installed; pip install {tool}"):
        opened(tool, tmp_path)


def test_other_ranks_and_a_disabled_tracker_record_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_tool("mlflow")
    for given in ({"rank": 1}, {"mode": "disabled"}):
        assert type(opened("tensorboard", tmp_path / "run", **given)) is Track
    assert not (tmp_path / "run").exists()
