"""Trackers beside Weights & Biases, `track.tool`: TensorBoard and MLflow, where they are installed."""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.runtime.log import say
from pipeline.runtime.records import load_record, save_record
from pipeline.runtime.tracker import Track

PACKAGES = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow",)}  # tool -> what it imports
VALUE = 500  # characters of a parameter of MLflow


class TensorBoardTrack(Track):
    """Scalars and pictures as TensorBoard event files in a folder; files stay in the run folder."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, metrics: Mapping[str, float], step: int | None, stage: str) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step or 0)

    def image(self, path: Path, name: str) -> None:
        import numpy
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, numpy.asarray(picture.convert("RGB")), dataformats="HWC")

    def finish(self, failed: bool = False) -> None:
        self._writer.close()


class MLflowTrack(Track):
    """A run of MLflow's tracking server, MLFLOW_TRACKING_URI, or of a database in the run folder without one."""

    def __init__(self, run: Any, client: Any):
        self._run, self._client = run.info.run_id, client

    def log(self, metrics: Mapping[str, float], step: int | None, stage: str) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._run, f"{stage}/{name}".replace("=", "-"), float(value), step=step or 0)

    def artifact(self, path: Path, name: str, kind: str) -> None:
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        log(self._run, str(path), kind)

    def table(self, path: Path, name: str) -> None:
        self._client.log_artifact(self._run, str(path))

    def image(self, path: Path, name: str) -> None:
        self._client.log_artifact(self._run, str(path), str(Path(name).parent))

    def finish(self, failed: bool = False) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def check_tool(tool: str) -> None:
    """Raise ValueError where a tracker is not installed."""
    missing = [package for package in PACKAGES.get(tool, ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"track.tool: {tool} is not installed; pip install {missing[0]}, or set track.tool=wandb")


def open_tracker(track: Mapping[str, Any], name: str, folder: Path, config: dict, rank: int) -> Track:
    """Open, or continue, the tracker's run of the pipeline run `name`, kept in `folder` (runs/<name>).

    `track` is the section of settings of that name. Raise ValueError where the tool is not installed, and as
    `open_track`.
    """
    tool = track["tool"]
    check_tool(tool)
    if rank != 0 or track["mode"] == "disabled":
        return Track()
    if tool == "wandb":
        from pipeline.runtime.track import open_track

        settings = {each: track[each] for each in ("mode", "project", "entity", "group", "tags")}
        return open_track(**settings, name=name, folder=folder, config=config, rank=rank)
    folder = Path(folder).absolute()
    if tool == "tensorboard":
        say(f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}", 0)
        return TensorBoardTrack(folder / "tensorboard")
    return _mlflow(track, name, folder, config)


def _mlflow(track: Mapping[str, Any], name: str, folder: Path, config: dict) -> MLflowTrack:
    from mlflow.tracking import MlflowClient

    folder.mkdir(parents=True, exist_ok=True)
    server = os.environ.get("MLFLOW_TRACKING_URI")
    place, files = (server, None) if server else (f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlflow").as_uri())
    client = MlflowClient(place)
    experiment = client.get_experiment_by_name(track["project"])
    number = experiment.experiment_id if experiment else client.create_experiment(track["project"], files)
    note = folder / "mlflow_id.json"
    known: dict[str, str] = load_record(note, {})
    if known.get("uri") == place and known.get("experiment") == number:
        run = client.get_run(known["run"])
        client.update_run(known["run"], status="RUNNING")
    else:
        tags = {"group": track["group"] or "", **{tag: "" for tag in track["tags"]}}
        run = client.create_run(number, run_name=name, tags=tags)
        save_record(note, {"uri": place, "experiment": number, "run": run.info.run_id})
        for key, value in _flat(config):
            client.log_param(run.info.run_id, key, str(value)[:VALUE])
    say(f"MLflow: run {run.info.run_id} of experiment {track['project']} at {place}", 0)
    return MLflowTrack(run, client)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting by its full name."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
