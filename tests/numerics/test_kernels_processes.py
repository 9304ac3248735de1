"""Kernel tests that need a process of their own, since what they import decides how the whole process works."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.runtime.device import missing

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def passes(tests: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / tests)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_triton_kernels_mean_what_the_references_mean():
    pytest.importorskip("triton")
    passes("kernels_triton.py", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.skipif(missing("cuda") is not None, reason="there is no GPU")
def test_triton_kernels_mean_the_same_compiled_for_a_gpu():
    passes("kernels_triton.py", KERNELS_DEVICE="cuda")


def test_ascend_operators_mean_what_the_references_mean():
    passes("kernels_ascend.py")


@pytest.mark.skipif(missing("npu") is not None, reason="there is no NPU")
def test_torch_npus_own_operators_mean_the_same():
    passes("kernels_ascend.py", KERNELS_DEVICE="npu", TORCH_NPU_FALLBACK_CPU_DISABLE="1")


TOGETHER = """
import kernels
assert "site-packages" in kernels.__file__, kernels.__file__
from kernels import LayerRepository, get_kernel
from transformers import LlamaConfig, LlamaForCausalLM
import fused
assert fused.op("rms_norm", "cpu").__module__ == "fused.reference"
"""


def test_hugging_faces_kernels_distribution_and_ours_live_side_by_side():
    """From the repository root, where a folder `kernels` lies first on the path, the distribution of that name wins."""
    if not list(importlib.metadata.distributions(name="kernels")):
        pytest.skip("Hugging Face's kernels distribution is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", TOGETHER], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_source_root_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
