"""Watch unchanged code: functions by the profile hook of the interpreter, modules by the global hooks of PyTorch.

Nothing is replaced. A hook that raises interrupts what is watched at that point.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import unwrap
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from pipeline.model.causal import decoder_of

Arguments = dict[str, Any]


@contextmanager
def watched(hooks: Mapping[Callable, Callable[[Arguments], None]]) -> Iterator[None]:
    """Within the block, call a hook with the arguments of every call of a Python function in this thread."""
    by_code = {unwrap(function).__code__: hook for function, hook in hooks.items()}

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in by_code:
            by_code[frame.f_code](dict(frame.f_locals))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


@contextmanager
def calls_of(function: Callable, fault: Exception | KeyboardInterrupt | None = None, at: int = 0) -> Iterator[list]:
    """Yield a list that grows by the arguments of every call of a function; raise `fault` at call number `at`."""
    calls: list[Arguments] = []

    def note(arguments: Arguments) -> None:
        calls.append(arguments)
        if fault is not None and len(calls) == at:
            raise fault

    with watched({function: note}):
        yield calls


@contextmanager
def forwards(
    before: Callable[[nn.Module, Any], None] | None = None, after: Callable[[nn.Module, Any, Any], None] | None = None
) -> Iterator[None]:
    """Within the block, call hooks before and after the forward of every module of any model, with its inputs."""
    with ExitStack() as undo:
        if before is not None:
            undo.callback(register_module_forward_pre_hook(before).remove)
        if after is not None:
            undo.callback(register_module_forward_hook(after).remove)
        yield


@contextmanager
def texts_read_in_training() -> Iterator[list[torch.Tensor]]:
    """Yield a list that grows by the ids of every batch that a model in training mode reads."""
    read: list[torch.Tensor] = []

    def note(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Embedding) and module.training:
            read.append(inputs[0].cpu())

    with forwards(note):
        yield read


def counted(model: torch.nn.Module, runs: Counter) -> torch.nn.Module:
    """Count by layer how often its FFN runs."""
    for index, layer in enumerate(decoder_of(model).layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.update([index]))
    return model


def inputs_of(model, ids, names):
    """Return what some modules read of ids, [tokens, width] each, by module name."""
    record = {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, i, n=n: record.update({n: i[0].flatten(0, 1)}))
        for n in names
    ]
    with torch.no_grad():
        model.model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return record
