"""python -m pipeline: Hydra composes the configuration, pydantic validates it once, the recipe's line runs."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pipeline.config import Config, validate

HERE = Path(__file__).resolve().parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"


@contextmanager
def _stoppable() -> Iterator[None]:
    """End with one line, from the first rank, and the exit status of an interrupt where the user stops the command."""
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("PIPELINE_TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") == "0":
            print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


@_stoppable()
def main() -> None:
    """Run a pipeline, or one of the small commands beside it: doctor, clean, calibrate-chip."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.argv[1:2] == ["doctor"]:
        from pipeline.runtime.doctor import doctor

        sys.exit(doctor(sys.argv[2:]))
    if sys.argv[1:2] == ["clean"]:
        from pipeline.runtime.clean import clean

        sys.exit(clean(sys.argv[2:]))
    if sys.argv[1:2] == ["calibrate-chip"]:
        _calibrate_chip(sys.argv[2:])
        return
    sys.argv[1:] = arranged(sys.argv[1:])
    _compose()
    ranks = sys.modules.get("pipeline.runtime.ranks")  # not loaded where Hydra only answered, as to --help
    if ranks is not None:
        ranks.leave()


def arranged(words: Sequence[str]) -> list[str]:
    """Give the words of a command with --multirun first: argparse, which Hydra uses, wants all overrides together."""
    return sorted(words, key=lambda word: word not in ("-m", "--multirun"))


def _calibrate_chip(overrides: Sequence[str]) -> None:
    """Fit a chip model to this device, or say how that is asked for."""
    if not {"-h", "--help"}.isdisjoint(overrides):
        print("python -m pipeline calibrate-chip [calibrate.name=NAME] [calibrate.folder=FOLDER] [SETTING=VALUE ...]")
        return
    with _clear_faults(), hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        from pipeline.estimate import calibrate_chip

        values = OmegaConf.to_container(hydra.compose("config", overrides=list(overrides)), resolve=True)
        chosen = values["device"]["chip"] is not None
        calibrate_chip(validate(values) if chosen else for_the_chip_found(values, overrides))


@contextmanager
def _clear_faults() -> Iterator[None]:
    """End with one clear line where the input, a peer or the numbers are at fault; PIPELINE_TRACEBACK=1 tells all."""
    from pipeline.runtime.ranks import PeerFailed

    try:
        yield
    except (ValueError, OSError, FloatingPointError, PeerFailed, CompactHydraException) as fault:
        if os.environ.get("PIPELINE_TRACEBACK"):
            raise
        of_a_file = isinstance(fault, OSError) and fault.filename is not None
        told = f"{fault.filename}: {fault.strerror}" if of_a_file else str(fault)
        print("error:", *filter(None, map(str.strip, told.splitlines())), file=sys.stderr)
        sys.exit(2)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _compose(composed: DictConfig) -> None:
    from pipeline import runner  # here, so that --help answers without loading torch

    with _clear_faults():
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            values["track"]["group"] = values["track"]["group"] or values["run"]
            values["run"] = f"{values['run']}/{_sweep_name()}"
        config = validate(values)
        if config.device.chip is None and config.predicts:
            config = for_the_chip_found(values, HydraConfig.get().overrides.task)
        runner.run(config, "python -m pipeline " + " ".join(sys.argv[1:]))


def for_the_chip_found(values: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Give the composed configuration with the chip model of the device that this rank found, and say which it is."""
    from pipeline.runtime.device import chip_model, open_device
    from pipeline.runtime.ranks import place

    asked, (rank, _, local_rank) = values["device"], place()
    device = open_device(asked["kind"], asked["attention"], asked["deterministic"], local_rank, values["seed"])
    file, told = chip_model(device.kind, device.name)
    chip = hydra.compose("config", overrides=[*overrides, f"device/chip={file}"]).device.chip
    if rank == 0:
        print(told, flush=True)
    return validate(values | {"device": asked | {"chip": OmegaConf.to_container(chip, resolve=True)}})


def _sweep_name() -> str:
    """Give the swept overrides of this job, as a folder name."""
    parsed = OverridesParser.create().parse_overrides([a for a in sys.argv[1:] if not a.startswith("-")])
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    chosen = [text for text in HydraConfig.get().overrides.task if text.partition("=")[0].lstrip("+") in swept]
    return re.sub(r"[^\w.+=,-]", "_", ",".join(chosen)) or str(HydraConfig.get().job.num)


if __name__ == "__main__":
    main()
