"""The device of a rank: chosen in order, seeded, measured."""

import gc
import random
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipeline.runtime import device as devices
from pipeline.runtime.device import CHIPS, chip_model, missing, open_device


def opened(**changes):
    plain = {"kind": "cpu", "attention": "auto", "deterministic": False, "local_rank": 0, "seed": 0}
    return open_device(**{**plain, **changes})


def test_auto_takes_the_first_kind_that_can_run():
    expected = next(kind for kind in ("npu", "cuda", "cpu") if missing(kind) is None)
    assert opened(kind="auto").kind == expected


def test_a_device_names_its_backend_attention_and_accelerator(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    device = opened()
    assert (device.backend, device.attention, device.torch) == ("gloo", "auto", torch.device("cpu"))
    assert devices.os.environ["DS_ACCELERATOR"] == "cpu"
    assert opened(attention="eager").attention == "eager"


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_a_kind_that_cannot_run_is_refused_in_one_line_with_a_remedy(kind):
    if missing(kind) is None:
        pytest.skip(f"this machine has {kind}")
    with pytest.raises(ValueError, match=rf"device.kind: {kind} .*device=auto") as fault:
        opened(kind=kind)
    assert "\n" not in str(fault.value)


def test_equal_seeds_give_equal_draws_of_every_generator():
    def draws(seed):
        opened(seed=seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draws(7) == draws(7)
    assert all(a != b for a, b in zip(draws(7), draws(8)))


def test_determinism_is_switched_on_and_off():
    opened(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    opened()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "flags, native",
    [("avx2 avx512f", False), ("avx512_vnni avx512_bf16", True), ("sse amx_bf16", True), ("fp asimd i8mm bf16", True)],
)
def test_bf16_counts_as_native_only_with_instructions_that_multiply_it(flags, native):
    assert devices.multiplies_bf16(flags) == native


def test_a_cpu_without_native_bf16_computes_in_float32():
    wanted = torch.bfloat16 if devices.bf16_is_native("cpu") else torch.float32
    assert opened().compute_dtype == wanted


def test_the_peak_of_a_cpu_sees_memory_that_is_gone_and_a_reset_forgets_it():
    device = opened()
    gc.collect()
    device.reset_peak_memory()
    before = device.peak_memory()
    missing_to_peak = before - psutil.Process().memory_info().rss  # above 0 where the kernel cannot reset the peak
    large = torch.ones((256 << 20) + max(missing_to_peak, 0), dtype=torch.uint8)  # much more than other tests free
    del large
    after = device.peak_memory()
    assert after - before > 48 << 20
    device.reset_peak_memory()
    if device.peak_memory() == after:
        pytest.skip("this kernel does not let a process reset its peak")
    assert device.peak_memory() < after - (32 << 20)


def test_a_device_has_memory_and_can_be_waited_for():
    device = opened()
    device.synchronise()
    assert device.peak_memory() < device.total_memory()


@pytest.mark.parametrize(
    "kind, name, file",
    [
        ("npu", "Ascend910B3", "910B3"), ("npu", "Ascend910B1", "910B1"), ("npu", "Ascend910B2C", "910B2"),
        ("npu", "Ascend910B4-1", "910B4"), ("npu", "Ascend910_9392", "A3"), ("cuda", "NVIDIA H100 80GB HBM3", "H100"),
        ("cpu", "AMD EPYC 7B13", "CPU"),
    ],
)  # fmt: skip
def test_a_chip_with_a_model_is_described_by_it(kind, name, file):
    assert chip_model(kind, name) == (file, f"chip model: {file}, for {name}")


@pytest.mark.parametrize(
    "kind, name, file",
    [("npu", "Ascend310P3", "910B3"), ("cuda", "NVIDIA A30", "H100"), ("cpu", "Intel(R) Xeon(R) CPU", "CPU")],
)
def test_a_chip_without_a_model_is_said_to_have_a_stand_in(kind, name, file):
    taken, result = chip_model(kind, name)
    assert taken == file and result.startswith(f"chip model: {file} stands in for {name}; choose device/chip=NAME")


def test_every_chip_model_is_a_file_of_the_configuration():
    there = {path.stem for path in (Path(__file__).parents[2] / "conf/device/chip").glob("*.yaml")}
    assert {file for files in CHIPS.values() for file in files.values()} <= there
