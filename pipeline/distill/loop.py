"""The training loop: accumulate, step, measure, save. It drives an engine and knows nothing of what is behind it."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.distill.selection import Selection
from pipeline.model.marks import positions

HELD_OUT = "held_out_"  # prefix of a number that was measured on held-out text


class Engine(Protocol):
    """What the loop needs. All ranks call the same methods in the same order."""

    def backward(self, batch: Tensor, weight: float = 1.0) -> dict[str, Tensor]: ...
    def step(self, learning_rate: float) -> float: ...
    def measure(self, batch: Tensor) -> dict[str, Tensor]: ...
    def average(self, values: Mapping[str, Tensor]) -> dict[str, float]: ...
    def save(self, folder: Path, step: int, keep: int, best: int | None) -> None: ...


@dataclass(frozen=True)
class Course:
    """A training run: its length, when it is measured and saved, and the seed of what is drawn at random (dropout)."""

    section: str  # of the settings, for messages
    steps: int
    accumulation: int  # micro-batches per step and rank
    tokens: Callable[[int], int]  # of so many steps, all ranks together
    validate_every: int  # steps
    save_every: int  # steps
    keep: int  # checkpoints
    seed: int
    marked: bool = False  # batches have marks (model/marks.py), and the loss of a step is a mean over what they count


Weighted = tuple[Tensor, float]  # a batch [rows, sequence] and its weight in the mean over all ranks' batches


def train(
    engine: Engine,
    batches: Iterator[Tensor],
    held_out: Sequence[Weighted],
    course: Course,
    rate: Callable[[int], float],
    start: int,
    checkpoints: Path,
    record: Callable[[dict[str, float]], None],
    progress: Callable[[Iterable[int]], Iterable[int]],
    selection: Selection,
) -> Selection:
    """Train from step `start` to the end of the course, or until `selection` stops it; return the last selection.

    `batches`: this rank's micro-batches [micro_batch, sequence], beginning with those of step `start`; those of a step
    are taken at its beginning, so they may depend on the weights after the step before. `rate`: the learning rate of a
    step; `selection`: the held-out measurements up to `start`. `record` is called with the numbers
    after every step (and before the first): step, loss and its parts, learning_rate, grad_norm, tokens,
    tokens_per_second (of training alone), and what `measured` returns where it was called. A checkpoint is saved every
    `save_every` steps, and after a measurement that is the best one, where the selection exports it.
    FloatingPointError where loss or gradient are not finite; the last checkpoint remains.
    """
    saved = start
    if start == 0:
        metrics = measured(engine, held_out)
        record({"step": 0, "tokens": 0} | metrics)
        selection = selection.after(0, metrics)
    for step in progress(range(start, course.steps)):
        if selection.stops:
            break
        began = time.perf_counter()
        torch.manual_seed(course.seed + step)  # random draws depend on the step alone: a resumed run repeats them
        metrics = _accumulate(engine, batches, course)
        metrics["learning_rate"] = rate(step)
        metrics["grad_norm"] = engine.step(rate(step)) if math.isfinite(metrics["loss"]) else math.nan
        if not math.isfinite(metrics["grad_norm"]):
            raise FloatingPointError(_diverged(course.section, step + 1, metrics, saved, checkpoints))
        done = step + 1
        seconds, tokens = time.perf_counter() - began, course.tokens(done)
        metrics |= {"step": done, "tokens": tokens, "tokens_per_second": (tokens - course.tokens(step)) / seconds}
        if done % course.validate_every == 0 or done == course.steps:
            held = measured(engine, held_out)
            metrics |= held
            selection = selection.after(done, held)
        record(metrics)
        if done < course.steps and (done % course.save_every == 0 or selection.exported == done):
            engine.save(checkpoints, done, course.keep, selection.exported)
            saved = done
    return selection


def measured(engine: Engine, batches: Sequence[Weighted]) -> dict[str, float]:
    """Return the means over all ranks' held-out batches of what the engine measures: held_out_<part> -> value.

    For a distiller that is the KL of teacher to student, in nats per token.
    """
    totals: dict[str, Tensor] = {}
    for batch, weight in batches:
        for name, value in engine.measure(batch).items():
            totals[name] = totals.get(name, 0.0) + weight * value
    return {f"{HELD_OUT}{name}": value for name, value in engine.average(totals).items()}


def _accumulate(engine: Engine, batches: Iterator[Tensor], course: Course) -> dict[str, float]:
    """Run the micro-batches of one step; return the means of loss and parts over them and over ranks."""
    several = [next(batches) for _ in range(course.accumulation)]
    weights = _weights(engine, several) if course.marked else [1.0] * len(several)
    sums: dict[str, Tensor] = {}
    for batch, weight in zip(several, weights, strict=True):
        for name, value in (engine.backward(batch, weight) if course.marked else engine.backward(batch)).items():
            sums[name] = sums.get(name, 0.0) + weight * value / course.accumulation
    return engine.average(sums)


def _weights(engine: Engine, batches: Sequence[Tensor]) -> list[float]:
    """Return the weight of each micro-batch's mean in the mean over all positions that the step counts on all ranks."""
    counts = [int(positions(batch).sum()) for batch in batches]
    each = engine.average({"counted": torch.tensor(float(sum(counts)))})["counted"]  # per rank
    return [count * len(batches) / each if each else 0.0 for count in counts]


def _diverged(section: str, step: int, metrics: Mapping[str, float], saved: int, checkpoints: Path) -> str:
    kept = f"the checkpoint of step {saved} is in {checkpoints}" if saved else "no checkpoint had been saved"
    return (
        f"{section}: loss {metrics['loss']:.4g} and gradient norm {metrics['grad_norm']:.4g} at step {step}, learning "
        f"rate {metrics['learning_rate']:.3g}; {kept}; lower {section}.learning_rate or {section}.max_grad_norm, with "
        f"which {section} starts again"
    )
