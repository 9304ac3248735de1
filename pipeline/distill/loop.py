"""The training loop: accumulate, step, measure, save; it talks to an engine and knows nothing of what drives it."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

HELD_OUT = "held_out_"  # before the name of a number measured on held-out text


class Engine(Protocol):
    """What the loop needs. All ranks call the same methods in the same order."""

    def backward(self, batch: Tensor) -> dict[str, Tensor]: ...
    def step(self, learning_rate: float) -> float: ...
    def measure(self, batch: Tensor) -> dict[str, Tensor]: ...
    def average(self, values: Mapping[str, Tensor]) -> dict[str, float]: ...
    def save(self, folder: Path, step: int, keep: int) -> Path: ...
    def load(self, folder: Path) -> int | None: ...
    def student_state(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Course:
    """A training run: its length, what happens on the way, and the seed of what is drawn at random (dropout)."""

    section: str         # of the settings, for messages
    steps: int
    accumulation: int    # micro-batches per step and rank
    tokens: int          # per step, all ranks together
    validate_every: int  # steps
    save_every: int      # steps
    keep: int            # checkpoints
    seed: int


Weighted = tuple[Tensor, float]  # a batch [rows, sequence] and its share of a mean over all ranks' batches


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
) -> None:
    """Train from step `start` to the end of the course.

    `batches`: this rank's micro-batches [micro_batch, sequence], beginning with those of step `start`; `rate`: the
    learning rate of a step. `record` gets the numbers after every step (and of the start): step, loss and its parts,
    learning_rate, grad_norm, tokens, tokens_per_second (training alone), and what `measured` gives where it was.
    FloatingPointError where loss or gradient are not finite; the last checkpoint stays.
    """
    saved = start
    if start == 0:
        record({"step": 0, "tokens": 0} | measured(engine, held_out))
    for step in progress(range(start, course.steps)):
        began = time.perf_counter()
        torch.manual_seed(course.seed + step)  # what is drawn depends on the step alone: a resumed run draws the same
        metrics = _accumulate(engine, batches, course.accumulation)
        metrics["learning_rate"] = rate(step)
        metrics["grad_norm"] = engine.step(rate(step)) if math.isfinite(metrics["loss"]) else math.nan
        if not math.isfinite(metrics["grad_norm"]):
            raise FloatingPointError(_diverged(course.section, step + 1, metrics, saved, checkpoints))
        done = step + 1
        metrics |= {"step": done, "tokens": done * course.tokens}
        metrics["tokens_per_second"] = course.tokens / (time.perf_counter() - began)
        if done % course.validate_every == 0 or done == course.steps:
            metrics |= measured(engine, held_out)
        record(metrics)
        if done % course.save_every == 0 and done < course.steps:
            engine.save(checkpoints, done, course.keep)
            saved = done


def measured(engine: Engine, batches: Sequence[Weighted]) -> dict[str, float]:
    """Give the means over all ranks' held-out batches of what the engine measures: held_out_<part> -> value.

    Of a distiller that is the KL of teacher to student, in nats per token.
    """
    totals: dict[str, Tensor] = {}
    for batch, weight in batches:
        for name, value in engine.measure(batch).items():
            totals[name] = totals.get(name, 0.0) + weight * value
    return {f"{HELD_OUT}{name}": value for name, value in engine.average(totals).items()}


def _accumulate(engine: Engine, batches: Iterator[Tensor], accumulation: int) -> dict[str, float]:
    """Run the micro-batches of one step; give the means of loss and parts over them and over ranks."""
    sums: dict[str, Tensor] = {}
    for _ in range(accumulation):
        for name, value in engine.backward(next(batches)).items():
            sums[name] = sums.get(name, 0.0) + value / accumulation
    return engine.average(sums)


def _diverged(section: str, step: int, metrics: Mapping[str, float], saved: int, checkpoints: Path) -> str:
    kept = f"the state after step {saved} is kept in {checkpoints}" if saved else "no checkpoint had been saved yet"
    return (
        f"{section} stopped at step {step}: loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g} at "
        f"learning rate {metrics['learning_rate']:.3g}; {kept}; lower {section}.learning_rate or {section}.clip,"
        f" with which {section} begins anew"
    )
