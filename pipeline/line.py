"""The line: a recipe's stages in order, each done once, each leaving one artifact."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline import advice
from pipeline.config import Config
from pipeline.lineup import STAGES, check, idle, is_wanted, makers_of, needs_of
from pipeline.runtime import artifacts, disk
from pipeline.runtime.device import open_device
from pipeline.runtime.machine import Machine
from pipeline.runtime.ranks import join, place
from pipeline.runtime.track import Track, open_track
from pipeline.runtime.view import show

VIEW = {
    "teacher": ("teacher", ""),
    "corrected": ("corrected", ""),
    "tokens": ("tokens", ""),
    "generated.jsonl": ("generated", "generated.jsonl"),
    "scores": ("scores", ""),
    "blueprint.json": ("blueprint", "blueprint.json"),
    "shape.json": ("shape", "shape.json"),
    "search.json": ("shape", "search.json"),
    "pareto.png": ("shape", "pareto.png"),
    "source": ("source", ""),
    "depth.json": ("depth", "depth.json"),
    "sensitivities.json": ("sensitivities", "sensitivities.json"),
    "restored": ("restored", ""),
    "supernet.json": ("restored", "supernet.json"),
    "blocks.json": ("start", "blocks.json"),
    "start": ("start", ""),
    "student": ("export", ""),
    "evaluation.json": ("evaluation", "evaluation.json"),
    "report.json": ("report", "report.json"),
    "report.html": ("report", "report.html"),
    "figures": ("report", "figures"),
}  # name in runs/<run>/ -> artifact, file in it
TRACKED = {"plan": ("blueprint.json", "blueprint"), "report": ("report.html", "report")}


def run(config: Config, command: str) -> dict[str, Path]:
    """Run the line; give its artifacts by name. Finished work is found and not done again."""
    names = check(config)
    device = open_device(
        config.device.kind, config.device.attention, config.device.deterministic, place()[2], config.seed
    )
    ranks = join(device, config.device.timeout)
    with ranks.guard():
        if ranks.rank == 0:  # which alone writes
            _probe_folders(config)
    view = Path(config.runs) / config.run
    record = {"command": command, "config": config.model_dump(mode="json"), "device": device.name, "stages": {}}
    tracked = config.track
    about = (tracked.mode, tracked.project, tracked.entity, tracked.group, tracked.tags)
    with ranks.guard(), open_track(*about, config.run, view, record["config"], ranks.rank) as track:
        machine = Machine(device, ranks, track)
        store = artifacts.Store(Path(config.artifacts), ranks, artifacts.code_revision(), device.name)
        if config.dry_run:
            made = _take(config, ["teacher", "adopt", "shape"], {}, store, machine, record)
            machine.say(advice.needs(config, made, ranks.world))
            return made
        made = _walk(config, names, store, machine, record)
        if not any(stage["made_now"] for stage in record["stages"].values()):
            machine.say(f"nothing to do: every stage of run {config.run} was finished before")
    if "report" in made:
        machine.say(f"report: {view / 'report.html'}")
    return made


def _probe_folders(config: Config) -> None:
    """Refuse folders that cannot be written to, before anything is worked out for them."""
    for field in ("artifacts", "runs"):
        folder = Path(getattr(config, field))
        try:
            disk.probe(folder)
        except OSError as fault:
            raise ValueError(f"{field} is {folder}: {fault.strerror}; give one where files can be locked") from None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Name the folder in an error of the system that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as fault:
        if fault.errno is not None and fault.filename is None:
            fault.filename = str(folder)
        raise


def _walk(
    config: Config, names: list[str], store: artifacts.Store, machine: Machine, record: dict[str, Any]
) -> dict[str, Path]:
    """Take the stages in order, those of recipe.repeat round after round.

    In a later round `teacher` is the student of the round before, `original` what taught in the first and `before`
    the blueprint of all rounds so far. What comes after the rounds sees the original as `teacher`, and its scores.
    """
    rounds, repeat = config.recipe.rounds, config.recipe.repeat
    if rounds == 1:
        return _take(config, names, {}, store, machine, record)
    places = [place for place, name in enumerate(names) if name in repeat]
    base = _take(config, names[: places[0]], {}, store, machine, record)
    first = made = _take(config.at_round(1), [names[place] for place in places], base, store, machine, record)
    recovers = any(STAGES[name].MAKES == "student" for name in repeat)
    for number in range(2, rounds + 1):
        student = made.get("student" if recovers else "start")
        if student is None:
            machine.say(f"stages leaves out what round {number} of {rounds} begins with; the rounds end here")
            return made
        known = base | {"teacher": student, "original": base["teacher"], "before": made["blueprint"]}
        made = _take(config.at_round(number), [names[place] for place in places], known, store, machine, record)
    left = {name: folder for name, folder in made.items() if name not in ("original", "before")}
    left |= {"teacher": base["teacher"], "scores": first["scores"]}
    return _take(config, names[places[-1] + 1 :], left, store, machine, record)


def _take(
    config: Config,
    names: list[str],
    known: Mapping[str, Path],
    store: artifacts.Store,
    machine: Machine,
    record: dict[str, Any],
) -> dict[str, Path]:
    """Take stages in order, beginning with known artifacts; show and tell each artifact as soon as it is there.

    Where a stage makes a `corrected` teacher of the one there is, the latter stays as `given`.
    """
    made = dict(known)
    number, rounds = config.recipe.part
    inner, told = ("", "") if number == rounds else (f"/rounds/{number}", f", round {number}")
    for name in names:
        stage = STAGES[name]
        folder, fresh = _step(config, name, stage, made, store, machine, is_wanted(config, name))
        if folder is None:
            continue
        if stage.MAKES == "teacher" and "teacher" in made:
            made |= {"given": made["teacher"], "corrected": folder}
        made[stage.MAKES] = folder
        record["stages"][name + told] = {"artifact": folder.name, "made_now": fresh}
        if machine.ranks.rank == 0 and not config.dry_run:  # which leaves the view as it is
            with _writing(Path(config.runs) / config.run):
                show(Path(config.runs), config.run, record, {} if inner else _view(made))
                if inner:
                    show(Path(config.runs), config.run + inner, record, _view(made))
        _tell(machine.track, config.run, name, folder)
    return made


def _step(
    config: Config,
    name: str,
    stage: ModuleType,
    made: dict[str, Path],
    store: artifacts.Store,
    machine: Machine,
    wanted: bool,
) -> tuple[Path | None, bool]:
    """Find or make one stage's artifact; give its folder, or None if it does not apply, and whether it was made now."""
    if idle(config, name):
        return None, False
    missing = [need for need in needs_of(config, stage) if need not in made]
    if missing:
        if not wanted:
            return None, False
        maker = makers_of(config)[missing[0]]
        raise ValueError(f"stages: {name} needs {missing[0]}, which stage {maker} makes; add {maker} to stages")
    inputs = {need: made[need] for need in (*needs_of(config, stage), *getattr(stage, "OPTIONAL", ())) if need in made}
    if "given" in made and getattr(stage, "COMPARES", False):
        inputs["teacher"] = made["given"]
    if hasattr(stage, "applies") and not stage.applies(config, inputs):
        return None, False
    settings = machine.ranks.share(stage.settings(config) if machine.ranks.rank == 0 else None)
    names = {need: folder.name for need, folder in inputs.items()}
    key = key_of(name, stage, settings, names)
    found = store.find(name, key)
    if found:
        machine.say(f"{name}: finished before, {found}")
        return found, False
    if not wanted:
        return None, False
    with _writing(store.path(name, key)), store.open(name, key, keep=getattr(stage, "RESUMES", False)) as partial:
        if partial is None:
            return store.path(name, key), False
        began = time.monotonic()
        machine.device.reset_peak_memory()
        if stage.EVERY_RANK or machine.ranks.rank == 0:
            stage.run(config, inputs, partial, machine)
        machine.ranks.wait(f"stage {name}")
        seconds = time.monotonic() - began
        return store.publish(name, key, settings, names, seconds, machine.device.peak_memory()), True


def key_of(name: str, stage: ModuleType, settings: Any, inputs: Mapping[str, str]) -> str:
    """Give the digest that names an artifact: of settings and inputs, and of how often the stage has changed what it
    makes of the same ones (its REVISION, raised with such a change: what was made before is then made anew)."""
    revision = {"revision": stage.REVISION} if hasattr(stage, "REVISION") else {}
    return artifacts.digest({"stage": name, "settings": settings, "inputs": inputs} | revision)


def _tell(track: Track, run: str, stage: str, folder: Path) -> None:
    """Give the tracker what people look at: the blueprint, the report and its pictures."""
    if stage in TRACKED:
        file, kind = TRACKED[stage]
        track.artifact(folder / file, f"{run}-{kind}", kind)
    for picture in sorted((folder / "figures").glob("*.png")):
        track.image(picture, f"{stage}/{picture.stem}")


def _view(made: dict[str, Path]) -> dict[str, Path]:
    made = {**made, "teacher": made.get("given", made.get("original", made["teacher"]))}
    named = {label: made[artifact] / inside for label, (artifact, inside) in VIEW.items() if artifact in made}
    return {label: target for label, target in named.items() if target.exists()}
