"""Settings of the pipeline on a measuring script's command line: composed with conf/ before any work, not validated."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[1] / "conf"


def composed(overrides: Sequence[str]) -> dict:
    """Return the composed configuration, not validated."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)


def with_settings(parser: ArgumentParser) -> tuple[Namespace, list[str]]:
    """Parse a command line whose end are settings; give the options and the settings, which conf/ is known to have."""
    request, settings = parser.parse_known_args()
    options = [word for word in settings if word.startswith("-")]
    if options:
        parser.error(f"unrecognized arguments: {' '.join(options)}; settings of the pipeline are name=value")
    try:
        composed(settings)
    except HydraException as fault:
        parser.error(f"settings {' '.join(settings)}: {' '.join(str(fault).split())}")
    return request, settings
