"""Modules that compute something else for a while: the one way to replace a forward."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the block, each module computes its function here; hooks, parameters and the class are unchanged.

    Afterwards each module has the forward it had before, its class's or an earlier replacement.
    """
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, earlier in before.items():
            if earlier is None:
                vars(module).pop("forward", None)
            else:
                module.forward = earlier
