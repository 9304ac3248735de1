"""Configurations for tests, composed as the command line composes them."""

from pathlib import Path
from typing import Any

from pipeline.cli.compose import CONF
from pipeline.cli.compose import composed as compose
from pipeline.config import Config, validate

ROOT = Path(__file__).resolve().parents[1]

__all__ = ["CONF", "ROOT", "composed", "validated"]


def composed(*overrides: str) -> dict[str, Any]:
    """Return the composed configuration with overrides, not validated."""
    return compose(overrides)


def validated(*overrides: str) -> Config:
    """Return the validated configuration with overrides."""
    return validate(composed(*overrides))
