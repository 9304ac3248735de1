"""Calibration: known factors are found again, products are really timed, a written chip reads back."""

from dataclasses import replace

import pytest
import torch
import yaml

from pipeline import config
from pipeline.costmodel.calibrate import (
    FITTED_WEIGHTS,
    HELD_OUT_WEIGHTS,
    ROWS,
    Calibration,
    Timing,
    calibrate,
    fit,
    misfit,
    stream_bandwidth,
    time_products,
    with_layer_overhead,
    write_chip,
)
from pipeline.costmodel.chip import Chip
from pipeline.costmodel.cost import Work, pass_seconds
from pipeline.costmodel.gemm import gemm_seconds
from pipeline.costmodel.shapes import ModelShape
from tests.chips import chip

CPU = torch.device("cpu")


def timings_of(true: Chip, weights) -> tuple[Timing, ...]:
    products = [(m, n, k, precision) for precision in ("bf16", "fp32") for n, k in weights for m in ROWS]
    return tuple(Timing(*each, gemm_seconds(true, *each, row_major=True)) for each in products)


@pytest.fixture(scope="module")
def true() -> Chip:
    changed = {
        "cube_efficiency": 0.6,
        "macs_fp32": 9.0,
        "memory_efficiency": 0.3,
        "launch_seconds": 4e-5,
        "overlap": 0.7,
    }
    return replace(chip("CPU"), **changed)


@pytest.fixture(scope="module")
def fitted(true) -> Chip:
    return fit(chip("CPU"), timings_of(true, FITTED_WEIGHTS))


def test_a_fit_finds_the_factors_that_made_the_timings(true, fitted):
    for name in ("cube_efficiency", "macs_fp32", "memory_efficiency", "launch_seconds", "overlap"):
        assert getattr(fitted, name) == pytest.approx(getattr(true, name), rel=0.02), name


def test_a_fit_predicts_products_it_never_saw(true, fitted):
    for timing in timings_of(true, HELD_OUT_WEIGHTS):
        assert abs(misfit(fitted, timing)) < 0.01


def test_held_out_weights_are_not_fitted():
    assert not set(FITTED_WEIGHTS) & set(HELD_OUT_WEIGHTS)


def test_products_are_timed_on_the_device_and_larger_ones_take_longer():
    small, large = time_products([(1, 64, 64, "fp32"), (512, 1024, 1024, "fp32")], CPU, lambda: None, range(2))
    assert (small.m, small.n, small.k, small.precision) == (1, 64, 64, "fp32")
    assert 0.0 < small.seconds < large.seconds < 10.0
    assert 1e8 < stream_bandwidth(CPU, lambda: None, 1) < 1e13


def test_a_calibration_measures_both_parts_and_keeps_what_it_does_not_fit():
    base, rounds = chip("CPU"), []
    found = calibrate(base, "mine", CPU, lambda: None, 1, (1, 16), lambda each: rounds.append(len(each)) or each)
    assert rounds == [1]
    assert len(found.fitted) == 2 * len(FITTED_WEIGHTS) * 2
    assert len(found.held_out) == 2 * len(HELD_OUT_WEIGHTS) * 2
    assert (found.chip.name, found.chip.tiles, found.chip.cube_cores) == ("mine", base.tiles, torch.get_num_threads())
    assert set(found.summary()) == {"fitted_median", "fitted_largest", "held_out_median", "held_out_largest"}
    with pytest.raises(ValueError, match="rounds is 0; give at least 1"):
        calibrate(base, "mine", CPU, lambda: None, 0)


def test_the_overhead_of_a_layer_makes_a_measured_pass_come_out_and_is_never_negative(true):
    shape, work = ModelShape(6, 128, 4, 2, 32, 256, 500, True), Work(1, 1, 64, "bf16", row_major=True)
    slow = with_layer_overhead(true, shape, work, 0.5)
    assert pass_seconds(slow, shape, work) == pytest.approx(0.5)
    assert with_layer_overhead(slow, shape, work, 1e-9).layer_seconds == 0.0


def test_a_written_chip_is_a_configuration_that_reads_back(tmp_path, true, fitted):
    calibration = Calibration(fitted, timings_of(true, FITTED_WEIGHTS), timings_of(true, HELD_OUT_WEIGHTS))
    write_chip(calibration, tmp_path / "mine.yaml", "a test")
    text = (tmp_path / "mine.yaml").read_text()
    read = Chip(**config.Chip.model_validate(yaml.safe_load(text)).model_dump())
    assert text.startswith("# Calibrated: a test.")
    assert read.tiles == fitted.tiles and read.kind == "cpu"
    for name in ("hbm_bandwidth", "launch_seconds", "overlap", "macs_fp32"):
        assert getattr(read, name) == pytest.approx(getattr(fitted, name), rel=1e-3)
    assert all(
        not isinstance(value, str) for name, value in yaml.safe_load(text).items() if name not in ("name", "kind")
    )
