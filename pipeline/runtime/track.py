"""Monitoring: one W&B run for one run of the pipeline, continued when the pipeline is run again.

Only this file knows W&B. Everything it writes stays in the run's own folder, and nothing here waits for a network that
is not there: a run without credentials is recorded offline and can be uploaded with `wandb sync`.
"""

import netrc
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import wandb

from pipeline.runtime.hashing import digest
from pipeline.runtime.log import say
from pipeline.runtime.records import load_record, save_record

START = 60.0    # seconds W&B may take to open a run
FINISH = 300.0  # seconds it may take to upload the rest at the end; what is left stays on disk for `wandb sync`
RETRIES = 3     # of one request while the run is opened
PUBLIC = ("api.wandb.ai", "api.forge.coreweave.com")  # the public server's two names
LONGEST = 128  # characters of a W&B name
MODES = ("auto", "online", "offline", "disabled")


class Track:
    """A W&B run, or nothing: on other ranks than the first and where tracking is disabled every method does nothing."""

    def __init__(self, run: "wandb.Run | None"):
        self._run = run
        self._stages: set[str] = set()

    def __enter__(self) -> "Track":
        return self

    def __exit__(self, kind, fault, trace) -> None:
        self.finish(failed=fault is not None)

    def log(self, metrics: Mapping[str, float], step: int | None, stage: str) -> None:
        """Record a stage's numbers: at a step of that stage's own axis, or with no step as results in the summary."""
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

        Any text is a name: it is recorded as `accepted` gives it.
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

    def finish(self, failed: bool = False) -> None:
        """Close the run, marked as failed or not, having uploaded what can be uploaded within five minutes."""
        if self._run is not None:
            self._do(lambda run: run.finish(exit_code=int(failed)))
            self._run = None

    def _do(self, step) -> None:
        """Tell W&B; where its process is gone, say so once and go on: training does not end with its monitor."""
        if self._run is None:
            return
        try:
            step(self._run)
        except (wandb.Error, OSError) as fault:
            self._run = None
            say(f"W&B stopped ({_reason(fault)}); the pipeline goes on without it", 0)


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
    else offline. ValueError where online is asked for and there are no credentials or no answer.
    """
    wanted = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
    if wanted not in MODES:
        raise ValueError(f"WANDB_MODE is {wanted!r}; set one of {', '.join(MODES)}")
    if rank != 0 or wanted == "disabled":
        return Track(None)
    if wanted == "online" and not logged_in():
        raise ValueError("track.mode is online without W&B credentials; run `wandb login`, or set track.mode=offline")
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    _keep_inside(folder / "wandb")
    about = {
        "project": project,
        "entity": entity,
        "group": accepted(group) if group and len(group) > LONGEST else group,
        "tags": tags,
        "name": name if len(name) <= LONGEST else accepted(name),
        "dir": str(folder),
        "config": config,
        "id": run_id(folder, config),
    }
    if wanted == "offline" or not logged_in():
        return _offline(about)
    try:
        run = _init(about, "online")
    except (wandb.Error, OSError) as fault:
        if wanted == "online":
            raise ValueError(f"track.mode is online, but {_reason(fault)}; or set track.mode=offline") from None
        say(f"W&B cannot be used online: {_reason(fault)}", 0)
        wandb.teardown()  # its process still holds the run's id
        return _offline(about)
    say(f"W&B: {run.url}", 0)
    return Track(run)


def logged_in() -> bool:
    """Whether W&B credentials are present: an environment variable or an entry in netrc. No network is used."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    candidates = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    settings = wandb.Settings()
    settings.update_from_system_settings()  # `wandb login --host` notes the server there
    settings.update_from_env_vars(os.environ)
    host = urlsplit(settings.base_url).hostname
    hosts = PUBLIC if host in PUBLIC else (host,)
    for path in (Path(candidate).expanduser() for candidate in candidates):
        if path.is_file():
            try:
                entries = netrc.netrc(path)
                return any(entries.authenticators(host) for host in hosts)
            except netrc.NetrcParseError as fault:
                raise ValueError(f"{path} cannot be read ({fault}); or set track.mode=offline") from None
    return False


def accepted(name: str) -> str:
    """Return a name in what W&B accepts: 1 to 128 of the characters A-Z a-z 0-9 _ . -

    An acceptable name is returned as it is. In any other the rest becomes `-`, and a digest of the whole name follows,
    so that two names which differ stay two.
    """
    if re.fullmatch(rf"[A-Za-z0-9_.-]{{1,{LONGEST}}}", name):
        return name
    mark = digest(name)
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)[: LONGEST - len(mark) - 1]}-{mark}"


def run_id(folder: Path, config: dict) -> str:
    """The id of the W&B run of this folder and configuration: the same when run again, new for a new configuration."""
    note = folder / "wandb_id.json"
    key = digest(config)
    known = load_record(note, {})
    if known.get("config") != key:
        known = {"config": key, "id": secrets.token_hex(4)}
        save_record(note, known)
    return known["id"]


def _offline(about: dict) -> Track:
    track = Track(_init(about, "offline"))
    say(f"W&B: offline; upload with `wandb sync {about['dir']}/wandb/offline-run-*-{about['id']}`", 0)
    return track


def _init(about: dict, mode: str) -> "wandb.Run":
    settings = wandb.Settings(
        silent=True,
        init_timeout=START,
        finish_timeout=FINISH,
        x_graphql_retry_max=RETRIES,
        disable_code=True,
        disable_git=True,
    )
    return wandb.init(**about, mode=mode, resume="allow", reinit="finish_previous", settings=settings)


def _keep_inside(folder: Path) -> None:
    for name, inner in (("WANDB_CACHE_DIR", "cache"), ("WANDB_DATA_DIR", "data")):
        os.environ[name] = str(folder / inner)
    os.environ["WANDB_SILENT"] = "true"


def _reason(fault: Exception) -> str:
    return f"{(str(fault).splitlines() or [type(fault).__name__])[0]:.240}"
