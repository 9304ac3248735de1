"""Run a recipe: find or make the artifact of each stage in order, bind the model roles, go through rounds."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import estimate
from pipeline.config import Config
from pipeline.graph import STAGES, check, is_wanted, makers_of, needs_of
from pipeline.runtime import artifacts, disk
from pipeline.runtime.device import open_device
from pipeline.runtime.machine import Machine
from pipeline.runtime.ranks import join, place
from pipeline.runtime.run_folder import show
from pipeline.runtime.track import Track, open_track
from pipeline.stages.stage import Stage

TRACKED = {"plan": ("blueprint.json", "blueprint"), "report": ("report.html", "report")}
PREVIOUS = ("previous_student", "previous_blueprint")  # bound in rounds after the first


@dataclass(frozen=True)
class Session:
    """What stays the same while stages run; `record` is written to run.json and grows with every stage."""

    config: Config
    store: artifacts.Store
    machine: Machine
    record: dict[str, Any]
    folders: dict[str, Path] = field(default_factory=dict)  # stage -> the artifact it made last


def run(config: Config, command: str) -> dict[str, Path]:
    """Run the stages of the recipe and return the folders of their artifacts by name; finished ones are reused.

    `command` is what the user typed, for run.json.
    """
    names = check(config)
    device = open_device(
        config.device.kind, config.device.attention, config.device.deterministic, place()[2], config.seed
    )
    ranks = join(device, config.device.timeout)
    with ranks.guard():
        if ranks.rank == 0:  # only this rank writes
            _probe_folders(config)
    folder = Path(config.runs) / config.run
    record = {"command": command, "config": config.model_dump(mode="json"), "device": device.name, "stages": {}}
    track = config.track
    settings = (track.mode, track.project, track.entity, track.group, track.tags)
    with ranks.guard(), open_track(*settings, config.run, folder, record["config"], ranks.rank) as tracker:
        machine = Machine(device, ranks, tracker)
        store = artifacts.Store(Path(config.artifacts), ranks, artifacts.code_revision(), device.name)
        session = Session(config, store, machine, record)
        if config.dry_run:
            made = _run_stages(session, ["teacher", "external_student", "shape"], {})
            machine.say(estimate.needs(config, made, ranks.world))
            return made
        made = _run_rounds(session, names)
        if not any(stage["made_now"] for stage in record["stages"].values()):
            machine.say(f"nothing to do: every stage of run {config.run} was finished before")
    if "report" in made:
        machine.say(f"report: {folder / 'report.html'}")
    return made


def _probe_folders(config: Config) -> None:
    """Raise ValueError for folders that cannot be written to, before any work is done for them."""
    for name in ("artifacts", "runs"):
        folder = Path(getattr(config, name))
        try:
            disk.probe(folder)
        except OSError as error:
            raise ValueError(f"{name}: {folder}: {error.strerror}; choose a folder where files can be locked") from None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Name the folder in a system error that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
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
        stage = STAGES[name]
        folder, fresh = _run_stage(session, stage, made)
        if folder is None:
            continue
        made |= dict.fromkeys((stage.makes, *stage.becomes), folder)
        record["stages"][name + suffix] = {"artifact": folder.name, "made_now": fresh}
        session.folders[name] = folder
        if machine.ranks.rank == 0 and not config.dry_run:
            with _writing(Path(config.runs) / config.run):
                shown = _shown(session.folders)
                show(Path(config.runs), config.run, record, {} if inner else shown)
                if inner:
                    show(Path(config.runs), config.run + inner, record, shown)
        _log_files(machine.track, config.run, name, folder)
    return made


def _run_stage(session: Session, stage: Stage, made: dict[str, Path]) -> tuple[Path | None, bool]:
    """Find or make a stage's artifact; return its folder, None where it does not apply, and whether it was made now."""
    config, store, machine = session.config, session.store, session.machine
    wanted = is_wanted(config, stage.name)
    if not stage.enabled(config):
        return None, False
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
    found = store.find(stage.name, key)
    if found:
        machine.say(f"{stage.name}: finished before, {found}")
        return found, False
    if not wanted:
        return None, False
    path = store.path(stage.name, key)
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
    """Return the digest that names an artifact: of stage, revision, settings and the names of the inputs."""
    return artifacts.digest({"stage": stage.name, "settings": settings, "inputs": inputs, "revision": stage.revision})


def _log_files(track: Track, run: str, stage: str, folder: Path) -> None:
    """Send the tracker what people look at: the blueprint, the report and its figures."""
    if stage in TRACKED:
        file, kind = TRACKED[stage]
        track.artifact(folder / file, f"{run}-{kind}", kind)
    for picture in sorted((folder / "figures").glob("*.png")):
        track.image(picture, f"{stage}/{picture.stem}")


def _shown(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Return what the run folder shows: name -> file or folder, as the stages that made the artifacts declare."""
    shown = {}
    for name, folder in folders.items():
        shown |= {label: folder / inside for label, inside in STAGES[name].shows.items()}
    return {label: target for label, target in shown.items() if target.exists()}
