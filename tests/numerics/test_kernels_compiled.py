"""Every Triton kernel compiles for an accelerator, which no interpreter shows, and fits the chips' vector cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fused.budget import KERNELS, MAX_GRID, problems

ROOT = Path(__file__).parents[2]


def chip(name: str) -> dict:
    """A chip's table: the one it starts from, then its own lines."""
    own = yaml.safe_load((ROOT / "conf/device/chip" / f"{name}.yaml").read_text())
    bases = [base for base in own.pop("defaults", []) if base != "_self_"]
    return {key: value for base in bases for key, value in chip(base).items()} | own


CHIPS = [c for c in map(chip, sorted(p.stem for p in (ROOT / "conf/device/chip").glob("*.yaml"))) if c["kind"] == "npu"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    script = Path(__file__).with_name("kernels_compiled.py")
    done = subprocess.run(
        [sys.executable, script, "bf16"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_kernel_of_the_budget_compiles(compiled):
    assert {record["kernel"] for record in compiled} == set(KERNELS)
    assert all(record["size"] > 1000 for record in compiled)


def test_the_budget_counts_every_live_tile(compiled):
    for record in compiled:
        assert 0 < record["live"] <= KERNELS[record["kernel"]].live, record


def test_loops_over_blocks_compare_no_integers(compiled):
    """Only the last block of a row is masked; what repeats is plain (an NPU compares integers one at a time)."""
    assert [record for record in compiled if record["compares"]] == []


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda c: c["name"])
def test_every_kernel_fits_every_ascend_chip(chip, kernel, itemsize):
    assert problems(kernel, 4096, itemsize, chip["vector_cores"], chip["ub_bytes"]) == []


def test_what_does_not_fit_is_named():
    kernel, footprint = next(iter(KERNELS.items()))
    need = footprint.block * footprint.live
    assert problems(kernel, 4096, 2, 48, 2 * need) == []
    assert f"keeps {need} bytes alive of {need - 1}" in problems(kernel, 4096, 2, 48, 2 * need - 2)[0]
    assert "more than 65535" in problems(kernel, 4096, 2, MAX_GRID + 1, 2 * need)[0]
    assert "rows of 80 bytes" in problems(kernel, 40, 2, 48, 2 * need)[0]
