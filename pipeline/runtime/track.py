"""Weights & Biases: one W&B run for one run of the pipeline, continued when the pipeline is run again.

Only this file uses W&B. All its files are in the run's own folder. Without credentials or network the run is recorded
offline and can be uploaded with `wandb sync`.
"""

import csv
import netrc
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import wandb

from pipeline.runtime.hashing import digest
from pipeline.runtime.log import say
from pipeline.runtime.records import load_record, save_record
from pipeline.runtime.tracker import Track

START = 60.0  # seconds within which W&B opens a run
FINISH = 300.0  # seconds for the upload at the end; the rest stays on disk for `wandb sync`
RETRIES = 3  # of one request while the run is opened
PUBLIC = ("api.wandb.ai", "api.forge.coreweave.com")  # the public server's two names
LONGEST = 128  # characters of a W&B name
MODES = ("auto", "online", "offline", "disabled")


class WandbTrack(Track):
    """A W&B run; every method does nothing once W&B has stopped."""

    def __init__(self, run: "wandb.Run"):
        self._run: wandb.Run | None = run
        self._stages: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int | None, stage: str) -> None:
        """Record a stage's metrics at a step of that stage's own axis; without a step, as results in the summary."""
        if self._run is None:
            return
        named = {f"{stage}/{name}": value for name, value in metrics.items()}
        if step is None:
            self._do(lambda run: run.summary.update(named))
            return
        if stage not in self._stages:
            self._stages.add(stage)
            self._do(lambda run: run.define_metric(f"{stage}/step", hidden=True))
            self._do(lambda run: run.define_metric(f"{stage}/*", step_metric=f"{stage}/step"))
        self._do(lambda run: run.log({**named, f"{stage}/step": step}))

    def artifact(self, path: Path, name: str, kind: str) -> None:
        """Record a file or a folder as a versioned artifact of a kind such as `blueprint` or `report`.

        The name may be any text; it is converted by `accepted`.
        """
        if self._run is None:
            return
        artifact = wandb.Artifact(accepted(name), kind)
        if Path(path).is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._do(lambda run: run.log_artifact(artifact))

    def image(self, path: Path, name: str) -> None:
        """Record a picture file."""
        if self._run is not None:
            self._do(lambda run: run.log({name: wandb.Image(str(path))}))

    def table(self, path: Path, name: str) -> None:
        """Record a CSV file as a table; numbers become numbers."""
        if self._run is None:
            return
        with Path(path).open(encoding="utf-8", newline="") as file:
            heading, *rows = csv.reader(file)
        names: list[str | int] = [*heading]
        table = wandb.Table(names, [[_number(cell) for cell in row] for row in rows], allow_mixed_types=True)
        self._do(lambda run: run.log({name: table}))

    def finish(self, failed: bool = False) -> None:
        """Close the run, marked as failed or not; upload for at most five minutes."""
        if self._run is not None:
            self._do(lambda run: run.finish(exit_code=int(failed)))
            self._run = None

    def _do(self, step) -> None:
        """Run a step of W&B; where its process has ended, print one line and continue without it."""
        if self._run is None:
            return
        try:
            step(self._run)
        except (wandb.Error, OSError) as error:
            self._run = None
            say(f"W&B stopped ({_reason(error)}); the pipeline continues without it", 0)


def open_track(
    mode: str,
    project: str,
    entity: str | None,
    group: str | None,
    tags: list[str],
    name: str,
    folder: Path,
    config: dict,
    rank: int,
) -> Track:
    """Open, or continue, the W&B run of the pipeline run `name`, kept in `folder` (runs/<name>).

    `mode`: online, offline, disabled, or auto: WANDB_MODE where it is set, else online where there are credentials,
    else offline. Raise ValueError for mode online without credentials or without an answer of the server.
    """
    chosen = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
    if chosen not in MODES:
        raise ValueError(f"WANDB_MODE is {chosen!r}; set one of {', '.join(MODES)}")
    if rank != 0 or chosen == "disabled":
        return Track()
    if chosen == "online" and not logged_in():
        raise ValueError("track.mode is online without W&B credentials; run `wandb login`, or set track.mode=offline")
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    _keep_inside(folder / "wandb")
    options = {
        "project": project,
        "entity": entity,
        "group": accepted(group) if group and len(group) > LONGEST else group,
        "tags": tags,
        "name": name if len(name) <= LONGEST else accepted(name),
        "dir": str(folder),
        "config": config,
        "id": run_id(folder, config),
    }
    if chosen == "offline" or not logged_in():
        return _offline(options)
    try:
        run = _init(options, "online")
    except (wandb.Error, OSError) as error:
        if chosen == "online":
            raise ValueError(f"track.mode is online, but {_reason(error)}; or set track.mode=offline") from None
        say(f"W&B cannot be used online: {_reason(error)}", 0)
        wandb.teardown()  # its process still holds the run's id
        return _offline(options)
    say(f"W&B: {run.url}", 0)
    return WandbTrack(run)


def logged_in() -> bool:
    """Return whether there are W&B credentials, in an environment variable or netrc; no network is used."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    candidates = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    settings = wandb.Settings()
    settings.update_from_system_settings()  # `wandb login --host` stores the server there
    settings.update_from_env_vars(dict(os.environ))
    host = urlsplit(settings.base_url).hostname
    hosts = PUBLIC if host is None or host in PUBLIC else (host,)
    for path in (Path(candidate).expanduser() for candidate in candidates):
        if path.is_file():
            try:
                entries = netrc.netrc(path)
                return any(entries.authenticators(host) for host in hosts)
            except netrc.NetrcParseError as error:
                raise ValueError(f"{path} cannot be read ({error}); or set track.mode=offline") from None
    return False


def accepted(name: str) -> str:
    """Return a name in what W&B accepts: 1 to 128 of the characters A-Z a-z 0-9 _ . -

    A valid name is returned unchanged. In any other, each invalid character becomes `-` and a digest of the whole name
    is appended, so that different names stay different.
    """
    if re.fullmatch(rf"[A-Za-z0-9_.-]{{1,{LONGEST}}}", name):
        return name
    mark = digest(name)
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)[: LONGEST - len(mark) - 1]}-{mark}"


def run_id(folder: Path, config: dict) -> str:
    """Return the id of the W&B run of this folder and configuration; another configuration gets a new one."""
    note = folder / "wandb_id.json"
    key = digest(config)
    known: dict[str, str] = load_record(note, {})
    if known.get("config") != key:
        known = {"config": key, "id": secrets.token_hex(4)}
        save_record(note, known)
    return known["id"]


def _offline(options: dict) -> Track:
    track = WandbTrack(_init(options, "offline"))
    say(f"W&B: offline; upload with `wandb sync {options['dir']}/wandb/offline-run-*-{options['id']}`", 0)
    return track


def _init(options: dict, mode: Literal["online", "offline"]) -> "wandb.Run":
    settings = wandb.Settings(
        silent=True,
        init_timeout=START,
        finish_timeout=FINISH,
        x_graphql_retry_max=RETRIES,
        disable_code=True,
        disable_git=True,
    )
    return wandb.init(**options, mode=mode, resume="allow", reinit="finish_previous", settings=settings)


def _keep_inside(folder: Path) -> None:
    for name, inner in (("WANDB_CACHE_DIR", "cache"), ("WANDB_DATA_DIR", "data")):
        os.environ[name] = str(folder / inner)
    os.environ["WANDB_SILENT"] = "true"


def _number(cell: str) -> float | str:
    """Return a cell of a CSV file as a number where it is one."""
    try:
        return float(cell)
    except ValueError:
        return cell


def _reason(error: Exception) -> str:
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.240}"
