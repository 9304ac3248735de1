"""Prefill and decode speed of several models, measured in turn, so that drift of the machine affects all alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from pipeline.evaluation.samples import continuation


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch 1: medians, and every run in the order it was made."""

    prefill: float
    decode: float
    prefill_runs: tuple[float, ...]
    decode_runs: tuple[float, ...]


def speeds(
    models: Mapping[str, torch.nn.Module],
    prompt: Tensor,
    decode: int,
    repeats: int,
    device: torch.device,
    synchronise: Callable[[], None],
) -> dict[str, Speed]:
    """Time every model on `prompt` [1, t] and `decode` greedy tokens after it, in turn: A B A B ...

    One model at a time is on the device. Each turn warms up by the same work (at most 8 decoded tokens) before it
    is timed; `synchronise` waits for the device.
    """
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            model.to(device)
            _time(model, prompt.to(device), min(decode, 8), synchronise)
            runs[name].append(_time(model, prompt.to(device), decode, synchronise))
            model.to("cpu")
    return {name: _summary(turns) for name, turns in runs.items()}


def _time(model: torch.nn.Module, prompt: Tensor, decode: int, synchronise: Callable[[], None]) -> tuple[float, float]:
    steps = continuation(model, prompt)
    synchronise()
    began = perf_counter()
    next(steps)
    synchronise()
    filled = perf_counter()
    for _ in islice(steps, decode):
        pass
    synchronise()
    ended = perf_counter()
    return prompt.shape[1] / (filled - began), decode / (ended - filled)


def _summary(turns: list[tuple[float, float]]) -> Speed:
    prefill, decode = zip(*turns)
    return Speed(median(prefill), median(decode), prefill, decode)
