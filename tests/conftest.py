"""What holds for every test."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores, so each computes with one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    """Mark every test with its folder, and those of stages and recipes: `pytest -m "unit and not stages"`."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else None
        if folder and (HERE / folder).is_dir():
            item.add_marker(folder)
        if item.path.name.startswith(("test_stage_", "test_recipe_")):
            item.add_marker("stages")


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from one random state: what it draws does not depend on the tests before it."""
    torch.manual_seed(0)
