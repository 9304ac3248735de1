"""The chips of conf/device/chip/, composed and validated as a run composes them."""

from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline import config
from pipeline.costmodel.chip import Chip

CONF = Path(__file__).parents[1] / "conf"
NAMES = sorted(path.stem for path in (CONF / "device" / "chip").glob("*.yaml"))


@cache
def chip(name: str) -> Chip:
    """Return a chip by the name of its file."""
    with initialize_config_dir(str(CONF), version_base=None):
        values = OmegaConf.to_container(compose("config", overrides=[f"device/chip={name}"]), resolve=True)
    return Chip(**config.Chip.model_validate(values["device"]["chip"]).model_dump())
