"""python -m pipeline: validate the settings, then run a recipe or one of the small commands beside it."""

import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.cli.boundary import Boundary
from pipeline.cli.registered import check_registered
from pipeline.cli.words import Command, parsed
from pipeline.config import Config, validate


def main() -> None:
    """Run the command in sys.argv.

    Its exit status is 0, 2 for refused input, 70 for a defect, 130 when interrupted, 141 where its output is read no
    more.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("stdout", "stderr"):  # None where the descriptor is closed
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):  # text outside the terminal's encoding is escaped, not refused
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    boundary = Boundary()
    with boundary():
        _check_folder()
        name, words = next(iter(sys.argv[1:]), ""), sys.argv[2:]
        if name in COMMANDS:
            status = COMMANDS[name](words)
            if status:
                sys.exit(status)
        else:
            _run(sys.argv[1:], boundary)


def _check_folder() -> None:
    """Raise ValueError where the folder that relative paths begin from was removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the working folder does not exist any more; change to one that does") from None


def _doctor(words: Sequence[str]) -> int:
    from pipeline.runtime.doctor import doctor

    return doctor(list(words))


def _clean(words: Sequence[str]) -> int:
    from pipeline.runtime.clean import clean

    return clean(list(words))


def _calibrate_chip(words: Sequence[str]) -> int:
    """Fit a chip model to this device, or print how."""
    command = parsed(words)
    if command.help is not None:
        print("python -m pipeline calibrate-chip [calibrate.name=NAME] [calibrate.folder=FOLDER] [SETTING=VALUE ...]")
        return 0
    from pipeline.cli.compose import composed

    compose = partial(composed, command.settings, command.config_dir)
    config = validate(compose())
    from pipeline.estimate import calibrate_chip

    calibrate_chip(config if config.device.chip is not None else with_found_chip(config, compose()))
    return 0


def _compare(words: Sequence[str]) -> int:
    from pipeline.cli.compare import compare

    return compare(words)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "doctor": _doctor,
    "clean": _clean,
    "calibrate-chip": _calibrate_chip,
    "compare": _compare,
}


def _run(words: Sequence[str], boundary: Boundary) -> None:
    command = parsed(words)
    if command.help is not None:
        from pipeline.cli.reference import help_text

        print(help_text(command.help), end="")
        return
    searched = command.multirun and any(word.startswith("hydra") for word in command.settings)
    runs = [] if searched else configurations(command)  # every point of a sweep is valid before the first one runs
    if command.show:
        from pipeline.cli.compose import as_yaml

        print("\n".join(as_yaml(config.model_dump(mode="json")) for config, _ in runs), end="")
        return
    from pipeline.runtime import ranks

    typed = f"python -m pipeline {shlex.join(words)}"
    if command.multirun:
        from pipeline.cli.sweep import run_sweep

        track: dict[str, Any] = {}

        def job(values: dict[str, Any], name: str) -> dict[str, Path]:
            with boundary():  # here, as Hydra would print an exception in its own way
                values = point_values(values, name)
                config = _validated(values)
                track.update(config.track.model_dump())
                return _run_one(config, values, typed, boundary)

        folder = run_sweep(command.settings, command.config_dir, job)
        if ranks.place()[0] == 0:
            _compare_sweep(folder, track)
    else:
        ((config, values),) = runs
        _run_one(config, values, typed, boundary)
    ranks.leave()


def _compare_sweep(folder: Path, track: dict[str, Any]) -> None:
    """Write the page that compares the runs of a sweep into its folder, where they made reports, and track it."""
    from pipeline.cli.compare import REPORT, write_comparison
    from pipeline.runtime.trackers import open_tracker

    if not any(folder.glob(f"*/{REPORT}")):
        return
    print(write_comparison([folder]), flush=True)
    if track:  # else the points ran in processes of a launcher's own
        with open_tracker(track, folder.name, folder, {}, 0) as tracker:
            tracker.table(folder / "compare.csv", "comparison")
            tracker.artifact(folder / "compare.html", f"{folder.name}-comparison", "comparison")


def _run_one(config: Config, values: dict[str, Any], command: str, boundary: Boundary) -> dict[str, Path]:
    from pipeline import runner

    boundary.folder = Path(config.runs) / config.run
    if config.device.chip is None and config.predicts:
        config = with_found_chip(config, values)
    return runner.run(config, command)


def configurations(command: Command) -> list[tuple[Config, dict[str, Any]]]:
    """Return the validated configurations of a command, with the mappings they come from; several with --multirun."""
    from pipeline.cli.compose import compose_point, composed, sweep

    places = (command.config_dir, command.source)
    if not command.multirun:
        values = composed(command.settings, *places)
        return [(_validated(values), values)]
    if command.source is not None:
        raise ValueError("--from: repeats one run; leave out --multirun, or write the settings of the sweep")
    found = []
    for name, point in sweep(command.settings, command.config_dir):
        values = point_values(compose_point(point, command.config_dir), name)
        found.append((_validated(values), values))
    return found


def _validated(values: dict[str, Any]) -> Config:
    config = validate(values)
    check_registered(config)
    return config


def point_values(values: dict[str, Any], swept: str) -> dict[str, Any]:
    """Return the configuration of a point of a sweep: a run of its own in the sweep's folder, and the sweep's group."""
    group = values["track"]["group"] or values["run"]
    return values | {"run": f"{values['run']}/{run_name(swept)}", "track": values["track"] | {"group": group}}


def run_name(swept: str) -> str:
    """Return the swept settings of a point as the name of a folder."""
    return re.sub(r"[^\w.+=,-]", "_", swept) or "0"


def with_found_chip(config: Config, values: dict[str, Any]) -> Config:
    """Return the configuration with the chip model of the device that this rank found; rank 0 prints which it is."""
    from pipeline.cli.compose import composed
    from pipeline.runtime.device import chip_model, open_device
    from pipeline.runtime.ranks import place

    rank, _, local_rank = place()
    kind, attention, deterministic = config.device.kind, config.device.attention, config.device.deterministic
    device = open_device(kind, attention, deterministic, local_rank, config.seed)
    file, message = chip_model(device.kind, device.name)
    if rank == 0:
        print(message, flush=True)
    chip = composed([f"device/chip={file}"])["device"]["chip"]
    return validate(values | {"device": values["device"] | {"chip": chip}})
