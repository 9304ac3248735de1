"""The chip model: published timings within the stated error, waves, alignment, chips as data."""

from dataclasses import fields, replace
from math import ceil

import pytest
from hydra import compose, initialize_config_dir

from pipeline import config
from pipeline.costmodel.chip import Chip
from pipeline.costmodel.gemm import (
    allreduce_seconds,
    gather_seconds,
    gemm_seconds,
    gemm_terms,
    row_share,
    vector_seconds,
)
from tests.chips import CONF, NAMES, chip

# M, N, K, precision, tile, chip, published microseconds, error of the model in percent
PUBLISHED = [
    (8192, 8192, 8192, "bf16", (128, 256), "910B1", 4012.0, 0.1),
    (1024, 576, 6144, "bf16", (128, 256), "910B3", 72.5, 7.4),
    (1024, 576, 6144, "bf16", (256, 128), "910B3", 48.6, -13.7),
    (20, 6144, 16384, "bf16", (128, 256), "910B3", 181.4, 3.5),
    (20, 6144, 16384, "bf16", (32, 320), "910B3", 139.6, 0.0),
    (160, 6144, 2048, "bf16", (128, 256), "910B3", 40.6, 3.3),
    (1, 768, 5120, "fp32", (128, 128), "910B1", 36.3, -7.9),
    (1, 768, 5120, "fp32", (16, 32), "910B1", 15.5, 5.1),
]


@pytest.fixture(scope="module")
def chips() -> dict[str, Chip]:
    return {name: chip(name) for name in NAMES}


@pytest.mark.parametrize(("m", "n", "k", "precision", "tile", "name", "published", "error"), PUBLISHED)
def test_a_published_timing_is_met_within_the_stated_error(chips, m, n, k, precision, tile, name, published, error):
    predicted = 1e6 * gemm_seconds(chips[name], m, n, k, precision, tile)
    assert 100 * (predicted / published - 1) == pytest.approx(error, abs=0.06)


def test_the_better_of_two_published_tiles_is_chosen(chips):
    for m, n, k, precision, name in [(1024, 576, 6144, "bf16", "910B3"), (1, 768, 5120, "fp32", "910B1")]:
        best = gemm_seconds(chips[name], m, n, k, precision)
        assert best <= min(gemm_seconds(chips[name], m, n, k, precision, tile) for tile in chips[name].tiles)
        assert best < gemm_seconds(chips[name], m, n, k, precision, chips[name].tiles[0])


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("910B1", 363.7), ("A3", 363.7), ("910B2", 353.9), ("910B3", 294.9), ("910B4", 245.8), ("H100", 989.4)],
)
def test_the_peak_is_the_published_one(chips, name, teraflops):
    assert chips[name].peak_flops("bf16") / 1e12 == pytest.approx(teraflops, abs=0.06)
    assert chips[name].name == name


def test_every_chip_is_mirrored_field_by_field():
    assert list(config.Chip.model_fields) == [field.name for field in fields(Chip)]


@pytest.mark.parametrize(("device", "chip"), [("auto", None), ("cpu", "CPU"), ("npu", None), ("cuda", "H100")])
def test_a_device_has_a_chip_or_waits_for_the_one_found_and_another_can_be_named(device, chip):
    with initialize_config_dir(str(CONF), version_base=None):
        own = compose("config", overrides=[f"device={device}"]).device.chip
        assert own is None if chip is None else own.name == chip
        named = compose("config", overrides=[f"device={device}", "device/chip=910B3", "device.chip.megahertz=1700"])
    assert (named.device.chip.name, named.device.chip.megahertz, named.device.kind) == ("910B3", 1700, device)


def test_a_tile_that_does_not_fit_its_buffer_is_refused(chips):
    with pytest.raises(ValueError, match=r"device\.chip\.tiles of 910B1: 256x256 needs 262144 bytes of l0c_bytes"):
        replace(chips["910B1"], tiles=((256, 256),))
    with pytest.raises(ValueError, match=r"device\.chip\.tiles of 910B1 is empty"):
        replace(chips["910B1"], tiles=())


def test_the_cube_term_counts_whole_waves_of_padded_tiles(chips):
    chip, tile = chips["910B3"], (128, 256)
    cube = {m: gemm_terms(chip, m, 2560, 4096, "bf16", tile)[0] for m in (1, 16, 17, 128, 256, 257)}
    assert cube[1] == cube[16] < cube[17]
    assert cube[256] == cube[128], "20 blocks are one wave on 20 cores, and so are 10"
    assert cube[257] == pytest.approx(2 * cube[256])
    waves = ceil(3 * 10 / 20)
    assert cube[257] == pytest.approx(waves * 128 * 256 * 4096 / (4096 * 1.8e9) / 0.76)


def test_rows_that_are_no_multiple_of_512_bytes_lose_their_share_of_the_bandwidth(chips):
    chip = chips["910B1"]
    assert [row_share(chip, size) for size in (512, 4096, 544, 510)] == [1.0, 1.0, 0.70, 0.525]
    aligned, block, ragged = (gemm_terms(chip, 4096, 256, k, "bf16", (128, 256))[1] / k for k in (4096, 4112, 4095))
    assert aligned < block < ragged
    assert vector_seconds(chip, 1e9, 510) - chip.launch_seconds == pytest.approx(1e9 / 1.49e12 / 0.784)
    assert vector_seconds(chip, 1e9, 512) - chip.launch_seconds == pytest.approx(1e9 / 1.49e12)


def test_row_major_weights_move_at_least_1_3_times_the_bytes(chips):
    chip = chips["910B1"]
    tiled, row_major = (gemm_terms(chip, 16, 8192, 8192, "bf16", (64, 512), flag)[1] for flag in (False, True))
    assert 1.25 < row_major / tiled <= 1.3
    ragged = gemm_terms(chip, 16, 8192, 8200, "bf16", (64, 512), True)[1]
    assert 1.7 < ragged / gemm_terms(chip, 16, 8192, 8200, "bf16", (64, 512), False)[1] <= 1.8


def test_the_longest_term_is_the_time_where_a_chip_overlaps_them_and_their_sum_where_it_does_not(chips):
    chip, tile = chips["910B1"], (128, 256)
    cube, memory, core = gemm_terms(chip, 512, 2048, 2048, "bf16", tile)
    assert gemm_seconds(chip, 512, 2048, 2048, "bf16", tile) == pytest.approx(6e-6 + max(cube, memory, core))
    apart = replace(chip, overlap=0.0)
    assert gemm_seconds(apart, 512, 2048, 2048, "bf16", tile) == pytest.approx(6e-6 + cube + max(memory, core))


def test_a_collective_is_free_alone_and_a_sum_moves_twice_what_a_gather_does(chips):
    chip = chips["910B1"]
    assert allreduce_seconds(chip, 1e9, 1) == gather_seconds(chip, 1e9, 1) == 0.0
    assert gather_seconds(chip, 1e9, 8) - chip.link_seconds == pytest.approx(1e9 * 7 / 8 / chip.link_bandwidth)
    assert allreduce_seconds(chip, 1e9, 8) - chip.link_seconds == pytest.approx(2e9 * 7 / 8 / chip.link_bandwidth)
    assert gather_seconds(chip, 1e9, 16) - chip.link_seconds == pytest.approx(1e9 * 15 / 16 / chip.network_bandwidth)
