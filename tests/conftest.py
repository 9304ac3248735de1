"""What holds for every test."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    """Mark every test with the name of its folder: `pytest -m unit`, `-m "numerics and not slow"`."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else None
        if folder and (HERE / folder).is_dir():
            item.add_marker(folder)


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from one random state: what it draws does not depend on the tests before it."""
    torch.manual_seed(0)
