"""Run a recipe: find or make the artifact of each stage in order, bind the model roles, go through rounds."""

import errno
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

from pipeline import estimate
from pipeline.config import Config
from pipeline.graph import STAGES, check, is_wanted, makers_of, needs_of, stages_of
from pipeline.runtime import artifacts, disk
from pipeline.runtime.device import open_device
from pipeline.runtime.hashing import digest
from pipeline.runtime.log import say
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import model_folder
from pipeline.runtime.ranks import join, place
from pipeline.runtime.run_folder import Shown, artifacts_of, check_places, show, write_record
from pipeline.runtime.tracker import Track
from pipeline.runtime.trackers import open_tracker
from pipeline.stages.stage import Stage

TRACKED = {"plan": ("blueprint.json", "blueprint"), "report": ("report.html", "report")}
PREVIOUS = ("previous_student", "previous_blueprint")  # bound in rounds after the first


@dataclass(frozen=True)
class Session:
    """What stays the same while stages run; `record` is written to run.json and grows with every stage.

    While the run is not complete the record also names the artifact under way (`unfinished`) and those of the runs
    before under this name (`earlier`), so that `clean` keeps them.
    """

    config: Config
    store: artifacts.Store
    machine: Machine
    record: dict[str, Any]
    stages: Mapping[str, Stage]
    total: int  # stages that this configuration runs, each round's counted
    begin: float = field(default_factory=time.monotonic)
    numbers: Iterator[int] = field(default_factory=lambda: count(1))
    folders: dict[str, Path] = field(default_factory=dict)  # stage -> the artifact it made last

    def heading(self, stage: str) -> str:
        """Return the beginning of the line that announces the next stage: its number and the time elapsed."""
        elapsed = timedelta(seconds=round(time.monotonic() - self.begin))
        return f"stage {next(self.numbers)} of {self.total}, {stage} ({elapsed} elapsed)"


def run(config: Config, command: str, stages: Mapping[str, Stage] = STAGES) -> dict[str, Path]:
    """Run the stages of the recipe and return the folders of their artifacts by name; finished ones are reused.

    `command`: what the user typed, for run.json. `stages`: what runs under each name of the graph.
    """
    names = check(config)
    chosen = config.device
    device = open_device(chosen.kind, chosen.attention, chosen.deterministic, place()[2], config.seed, chosen.kernels)
    ranks = join(device, config.device.timeout)
    with ranks.guard():
        if ranks.rank == 0:  # only this rank writes
            check_places(Path(config.runs), config.run, Path(config.artifacts), config.output)
    if config.recipe.reason is not None:
        say(f"recipe: {config.recipe.name}, as {config.recipe.reason} (docs/results.md)", ranks.rank)
    if config.dry_run:
        with ranks.guard():
            _dry_run(config, names, Machine(device, ranks, Track()))
        return {}
    folder = Path(config.runs) / config.run
    dumped = config.model_dump(mode="json")
    record: dict[str, Any] = {"command": command, "config": dumped, "device": device.name, "stages": {}}
    track = config.track.model_dump()
    with ranks.guard(), open_tracker(track, config.run, folder, dumped, ranks.rank) as tracker:
        machine = Machine(device, ranks, tracker)
        store = artifacts.Store(Path(config.artifacts), ranks, artifacts.code_revision(), device.name, config.verify)
        if ranks.rank == 0:
            record["earlier"] = _earlier(folder)
        session = Session(config, store, machine, record, stages, _count(config, names))
        made = _run_rounds(session, names)
        for unneeded in ("earlier", "unfinished"):
            record.pop(unneeded, None)
        _write(session)
        if not any(stage["made_now"] for stage in record["stages"].values()):
            machine.say(f"nothing to do: every stage of run {config.run} was finished before")
    if "report" in made:
        machine.say(f"report: {folder / 'report.html'}")
    if "student" in made:
        machine.say(f"student: {config.output or folder / 'student'}")
    return made


def _dry_run(config: Config, names: Sequence[str], machine: Machine) -> None:
    """Print from rank 0 what the trainings of a run need, and leave no file.

    Model folders are read where they are; a GGUF is unpacked into a temporary folder on the disk of the artifacts.
    """
    if machine.ranks.rank == 0:
        with tempfile.TemporaryDirectory(dir=disk.existing(Path(config.artifacts)), prefix=".dry-run-") as scratch:
            made: dict[str, Path] = {}
            for name, source in (("teacher", config.model.path), ("external_student", config.model.start)):
                if source is not None:
                    folder = model_folder(source, config.model.allow_pickle)
                    _fill(config, STAGES[name], made, Path(scratch), machine, folder)
            if STAGES["shape"].enabled(config):
                _fill(config, STAGES["shape"], made, Path(scratch), machine)
            answer = estimate.needs(config, made, machine.ranks.world)
            machine.say(answer + estimate.omitted(config, made, names))
    machine.ranks.wait("dry run")


def _fill(
    config: Config, stage: Stage, made: dict[str, Path], scratch: Path, machine: Machine, folder: Path | None = None
) -> None:
    """Add what a stage makes to `made`: a folder that is there already, or one inside `scratch` that it fills now."""
    if folder is None:
        folder = scratch / stage.name
        folder.mkdir()
        stage.run(config, made, folder, machine)
    made |= dict.fromkeys((stage.makes, *stage.becomes), folder)


def _earlier(folder: Path) -> list[str]:
    """Return the artifacts of earlier runs under this name; none, reported in a line, where run.json is damaged."""
    try:
        return sorted(artifacts_of(folder))
    except ValueError as error:
        say(f"{error}: it is damaged and written again", 0)
        return []


def _count(config: Config, names: list[str]) -> int:
    """Return how many stages run, those of `recipe.repeat` counted once a round."""
    enabled = [name for name in names if STAGES[name].enabled(config)]
    return len(enabled) + (config.recipe.rounds - 1) * sum(name in config.recipe.repeat for name in enabled)


def _check_model(config: Config, folder: Path) -> None:
    """Refuse what a model does not allow that was no folder before it was imported, such as a GGUF."""
    if model_folder(config.model.path, config.model.allow_pickle) is None:
        check(config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})}))


def _check_text(config: Config, tokens: Path) -> None:
    """Refuse a text that a stage of this run cannot use."""
    for name in stages_of(config):
        if STAGES[name].enabled(config) and is_wanted(config, name):
            STAGES[name].check_text(config, tokens)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Name the folder in a system error that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of NumPy, which says how much of an array it wrote
            reason = f"a file was not written whole ({error}); is the disk full?"
            raise OSError(errno.EIO, reason, str(folder)) from error
        if error.filename is None:
            error.filename = str(folder)
        raise


def _run_rounds(session: Session, names: list[str]) -> dict[str, Path]:
    """Run the stages in order, those of `recipe.repeat` once a round.

    In a later round `subject` and `previous_student` are the student of the round before, and `previous_blueprint` is
    the blueprint of all rounds so far. Stages after the rounds read the first subject and its scores again.
    """
    config, machine = session.config, session.machine
    rounds, repeat = config.recipe.rounds, config.recipe.repeat
    if rounds == 1:
        return _run_stages(session, names, {})
    places = [index for index, name in enumerate(names) if name in repeat]
    repeated = [names[index] for index in places]
    base = _run_stages(session, names[: places[0]], {})
    first = made = _run_stages(replace(session, config=config.at_round(1)), repeated, base)
    result = "recovered" if any(STAGES[name].makes == "recovered" for name in repeat) else "initial_student"
    for number in range(2, rounds + 1):
        student = made.get(result)
        if student is None:
            machine.say(f"stages: round {number} of {rounds} needs a student, which the chosen stages do not make")
            return made
        previous = {"subject": student, "previous_student": student, "previous_blueprint": made["blueprint"]}
        made = _run_stages(replace(session, config=config.at_round(number)), repeated, base | previous)
    left = {name: folder for name, folder in made.items() if name not in PREVIOUS}
    left |= {"subject": base["subject"], "scores": first["scores"]}
    return _run_stages(session, names[places[-1] + 1 :], left)


def _run_stages(session: Session, names: list[str], known: Mapping[str, Path]) -> dict[str, Path]:
    """Run stages in order, beginning with known artifacts; return all artifacts and model roles by name.

    The run folder shows every artifact as soon as it is finished.
    """
    config, machine, record = session.config, session.machine, session.record
    made = dict(known)
    number, rounds = config.recipe.part
    inner, suffix = ("", "") if number == rounds else (f"/rounds/{number}", f", round {number}")
    for name in names:
        stage = session.stages[name]
        folder, fresh = _run_stage(session, stage, made)
        if folder is None:
            continue
        made |= dict.fromkeys((stage.makes, *stage.becomes), folder)
        record["stages"][name + suffix] = {"artifact": folder.name, "made_now": fresh}
        session.folders[name] = folder
        if name == "teacher":
            with machine.ranks.guard():
                _check_model(config, folder)
        if "tokens" in (stage.makes, *stage.becomes):
            with machine.ranks.guard():
                _check_text(config, folder)
        _show(session, inner)
        _log_files(machine.track, config.run, name, folder)
    return made


def _show(session: Session, inner: str = "") -> None:
    """Bring the run folder up to date from rank 0; `inner` is the folder of a round inside it."""
    config = session.config
    if session.machine.ranks.rank != 0:
        return
    runs, shown = Path(config.runs), _shown(session.folders)
    output = None if config.output is None else Path(config.output)
    with _writing(runs / config.run):
        show(runs, config.run, session.record, {} if inner else shown, output)
        if inner:
            linked = {label: replace(each, delivered=False) for label, each in shown.items()}
            show(runs, config.run + inner, session.record, linked)


def _write(session: Session) -> None:
    """Write run.json from rank 0."""
    config = session.config
    if session.machine.ranks.rank == 0:
        with _writing(Path(config.runs) / config.run):
            write_record(Path(config.runs) / config.run, session.record)


def _run_stage(session: Session, stage: Stage, made: dict[str, Path]) -> tuple[Path | None, bool]:
    """Find or make a stage's artifact; return its folder, None where it does not apply, and whether it was made now."""
    config, store, machine = session.config, session.store, session.machine
    wanted = is_wanted(config, stage.name)
    if not stage.enabled(config):
        return None, False
    heading = session.heading(stage.name)
    needs = needs_of(config, stage)
    missing = [need for need in needs if need not in made]
    if missing:
        if not wanted:
            return None, False
        maker = makers_of(config)[missing[0]]
        raise ValueError(f"stages: {stage.name} reads {missing[0]}, which {maker} makes; add {maker} to stages")
    inputs = {need: made[need] for need in (*needs, *stage.optional) if need in made}
    if not stage.applies(config, inputs):
        return None, False
    settings = machine.ranks.share(stage.settings(config) if machine.ranks.rank == 0 else None)
    names = {need: folder.name for need, folder in inputs.items()}
    key = key_of(stage, settings, names)
    path = store.path(stage.name, key)
    session.record["unfinished"] = [path.name]
    _write(session)
    if store.find(stage.name, key):
        machine.say(f"{heading}: finished before, {path}")
        return path, False
    if not wanted:
        return None, False
    machine.say(heading)
    with _writing(path), store.open(stage.name, key, keep=stage.resumable) as partial:
        if partial is None:
            return path, False
        start = time.monotonic()
        machine.device.reset_peak_memory()
        if stage.all_ranks or machine.ranks.rank == 0:
            stage.run(config, inputs, partial, machine)
        machine.ranks.wait(f"stage {stage.name}")
        seconds = time.monotonic() - start
        return store.publish(stage.name, key, settings, names, seconds, machine.device.peak_memory()), True


def key_of(stage: Stage, settings: Any, inputs: Mapping[str, str]) -> str:
    """Return the digest that names an artifact: of the stage, its revision, settings and the names of its inputs."""
    return digest({"stage": stage.name, "settings": settings, "inputs": inputs, "revision": stage.revision})


def _log_files(track: Track, run: str, stage: str, folder: Path) -> None:
    """Send the tracker what people look at: the blueprint, the report and its figures."""
    if stage in TRACKED:
        file, kind = TRACKED[stage]
        track.artifact(folder / file, f"{run}-{kind}", kind)
    for picture in sorted((folder / "figures").glob("*.png")):
        track.image(picture, f"{stage}/{picture.stem}")


def _shown(folders: Mapping[str, Path]) -> dict[str, Shown]:
    """Return what the run folder shows, as the stages that made the artifacts declare."""
    shown: dict[str, Shown] = {}
    for name, folder in folders.items():
        stage = STAGES[name]
        shown |= {label: Shown(folder, inside, stage.delivers) for label, inside in stage.shows.items()}
    return {label: each for label, each in shown.items() if each.path.exists()}
