"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from one random state: what it draws does not depend on the tests before it."""
    torch.manual_seed(0)
