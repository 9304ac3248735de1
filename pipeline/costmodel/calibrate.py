"""Fit a chip's free factors to this machine: time matrix products, fit on some, report the error on others."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from math import exp, log
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.costmodel.chip import ELEMENT_BYTES, Chip
from pipeline.costmodel.cost import Work, pass_seconds
from pipeline.costmodel.gemm import gemm_seconds
from pipeline.costmodel.shapes import ModelShape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FACTORS = ("cube_efficiency", "macs_fp32", "memory_efficiency", "launch_seconds", "overlap")
ROWS = (1, 4, 16, 64, 256, 1024)
FITTED_WEIGHTS = ((1152, 512), (3072, 576), (512, 1152), (2048, 2048), (896, 4864))  # (n, k)
HELD_OUT_WEIGHTS = ((576, 576), (576, 1536), (2560, 1024))
LEAST = {**dict.fromkeys(FACTORS, 1e-3), "launch_seconds": 1e-6}  # no call from Python is shorter than a microsecond
STEPS, SLOPE = 60, 1e-3  # of the fit, and of its numerical derivative
COLD_BYTES = 96e6  # a pool of weights no cache of a CPU or GPU core holds


@dataclass(frozen=True)
class Timing:
    """One matrix product [m, k] x [k, n] and its shortest time."""

    m: int
    n: int
    k: int
    precision: str
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """A fitted chip; the products it was fitted to and those it never saw."""

    chip: Chip
    fitted: tuple[Timing, ...]
    held_out: tuple[Timing, ...]

    def summary(self) -> dict[str, float]:
        """Median and largest |predicted / measured − 1| of both parts; JSON-able."""
        result: dict[str, float] = {}
        for part, timings in (("fitted", self.fitted), ("held_out", self.held_out)):
            errors = [abs(exp(misfit(self.chip, timing)) - 1.0) for timing in timings]
            result |= {f"{part}_median": statistics.median(errors), f"{part}_largest": max(errors)}
        return result


def calibrate(
    base: Chip,
    name: str,
    device: torch.device,
    synchronise: Callable[[], None],
    rounds: int,
    rows: Sequence[int] = ROWS,
    progress: Callable[[Iterable], Iterable] = lambda each: each,
) -> Calibration:
    """Time products of so many `rows` on `device` and fit `base`, under a new name, to those with FITTED_WEIGHTS.

    `synchronise` waits for the device. `rounds` passes over the grid are made (`progress` wraps them) and every product
    keeps its shortest time, so that a busy moment does not count; a single CPU thread is timed by its own clock. On a
    CPU the cores are the threads torch uses and the memory is the machine's. What the fit leaves alone stays as `base`
    has it.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; give at least 1")
    base = replace(base, name=name)
    if device.type == "cpu":
        cores, memory = torch.get_num_threads(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        base = replace(base, cube_cores=cores, vector_cores=cores, hbm_bytes=float(memory))
    stream = stream_bandwidth(device, synchronise, rounds)
    base = replace(base, hbm_bandwidth=stream, vector_bandwidth=stream)
    if device.type == "cpu":
        base = replace(base, core_bandwidth=stream)  # one core can draw all of it
    weights = FITTED_WEIGHTS + HELD_OUT_WEIGHTS
    products = [(m, n, k, precision) for precision in DTYPES for n, k in weights for m in rows]
    timings = time_products(products, device, synchronise, progress(range(rounds)))
    fitted = tuple(timing for timing in timings if (timing.n, timing.k) in FITTED_WEIGHTS)
    held_out = tuple(timing for timing in timings if (timing.n, timing.k) in HELD_OUT_WEIGHTS)
    return Calibration(fit(base, fitted), fitted, held_out)


def clock(device: torch.device) -> Callable[[], float]:
    """Return the clock to time a device by: of one CPU thread its processor time, which no other program adds to."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


@torch.inference_mode()
def time_products(
    products: Sequence[tuple[int, int, int, str]],
    device: torch.device,
    synchronise: Callable[[], None],
    rounds: Iterable[int],
) -> list[Timing]:
    """Return the shortest time of every product (m, n, k, precision), each three times a round and in turn.

    Weights are read cold, as in a model: every call takes another matrix of a pool larger than the caches.
    """
    pools = {
        precision: torch.randn(int(COLD_BYTES / ELEMENT_BYTES[precision]), device=device).to(DTYPES[precision])
        for precision in sorted({product[3] for product in products})
    }
    inputs = {(m, k, p): torch.randn(m, k, device=device).to(DTYPES[p]) for m, _, k, p in products}
    now = clock(device)
    shortest = dict.fromkeys(products, float("inf"))
    for turn in rounds:
        for product in products:
            m, n, k, precision = product
            matrices = pools[precision][: pools[precision].numel() // (n * k) * n * k].view(-1, n, k)
            for call in range(3):
                weight = matrices[(turn * 3 + call) % len(matrices)]
                synchronise()
                begin = now()
                F.linear(inputs[m, k, precision], weight)
                synchronise()
                shortest[product] = min(shortest[product], now() - begin)
    return [Timing(*product, seconds) for product, seconds in shortest.items()]


@torch.inference_mode()
def stream_bandwidth(device: torch.device, synchronise: Callable[[], None], rounds: int) -> float:
    """Bytes per second of copying 128 MB, reads and writes counted, at the best of `rounds` after one to warm up."""
    source = torch.ones(32_000_000, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    now, shortest = clock(device), float("inf")
    for _ in range(rounds):
        synchronise()
        begin = now()
        target.copy_(source)
        synchronise()
        shortest = min(shortest, now() - begin)
    return 2 * source.numel() * source.element_size() / shortest


def fit(base: Chip, timings: Sequence[Timing]) -> Chip:
    """Return `base` with its free factors fitted to the least mean |ln(predicted / measured)|.

    Levenberg-Marquardt in the factors' logarithms, each timing weighted by the inverse of its misfit, so that an
    outlier pulls no harder than any other.
    """
    lowest = np.log([LEAST[name] for name in FACTORS])
    highest = np.array([0.0 if name == "overlap" else np.inf for name in FACTORS])

    def chip(point: np.ndarray) -> Chip:
        return replace(base, **dict(zip(FACTORS, np.exp(point).tolist(), strict=True)))

    def misfits(point: np.ndarray) -> np.ndarray:
        fitted = chip(point)
        return np.array([misfit(fitted, timing) for timing in timings])

    point = np.clip(np.log([getattr(base, name) for name in FACTORS]), lowest, highest)
    now, damping = misfits(point), 1.0
    for _ in range(STEPS):
        slopes = np.stack([(misfits(point + step) - now) / SLOPE for step in SLOPE * np.eye(len(FACTORS))], axis=1)
        weighted = slopes / np.maximum(np.abs(now), 1e-3)[:, None]
        normal = weighted.T @ slopes + damping * np.eye(len(FACTORS))
        tried = np.clip(point - np.linalg.solve(normal, weighted.T @ now), lowest, highest)
        then = misfits(tried)
        if np.abs(then).mean() < np.abs(now).mean():
            point, now, damping = tried, then, damping / 3.0
        else:
            damping *= 3.0
    return chip(point)


def with_layer_overhead(chip: Chip, shape: ModelShape, work: Work, seconds: float) -> Chip:
    """Return `chip` with the time a layer takes beyond its operations, from the time of one pass of a whole model."""
    bare = replace(chip, layer_seconds=0.0)
    return replace(bare, layer_seconds=max(0.0, seconds - pass_seconds(bare, shape, work)) / shape.layers)


def misfit(chip: Chip, timing: Timing) -> float:
    """ln(predicted / measured); weights are row-major, as torch keeps them."""
    predicted = gemm_seconds(chip, timing.m, timing.n, timing.k, timing.precision, row_major=True)
    return log(predicted / timing.seconds)


def write_chip(calibration: Calibration, path: Path, origin: str) -> None:
    """Write the fitted chip as a file of conf/device/chip/, its errors and `origin` (machine, date) as comments."""
    errors = calibration.summary()
    lines = [
        f"# Calibrated: {origin}.",
        f"# Shortest times of {len(calibration.fitted)} matrix products were fitted, error "
        f"{errors['fitted_median']:.1%} in the median, {errors['fitted_largest']:.0%} at most;",
        f"# of {len(calibration.held_out)} others, never fitted: {errors['held_out_median']:.1%} in the median, "
        f"{errors['held_out_largest']:.0%} at most.",
        "# Fitted: " + ", ".join(FACTORS) + "; measured: hbm_bandwidth, vector_bandwidth; the rest as it was given.",
    ]
    lines += [f"{field.name}: {_yaml(getattr(calibration.chip, field.name))}" for field in fields(Chip)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _yaml(value) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f"[{rows}, {columns}]" for rows, columns in value) + "]"
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.4g}"
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
