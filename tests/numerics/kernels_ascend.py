"""fused.ascend beside the references: every call binds to torch_npu's own schema and means what the reference means.

The schemas are the simulated NPU's, copied from the real torch_npu, computed by plain PyTorch. Registering them lasts
as long as the process, so test_kernels_processes.py runs this file in one of its own. With KERNELS_DEVICE=npu they are
those of torch_npu, on the chip: float32 within 1e-3, as its matrix unit may round the inputs (not yet run).
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from fused import ascend, reference

OPERATORS = Path(__file__).parents[1] / "npu/package/torch_npu/ops.py"
DEVICE = os.environ.get("KERNELS_DEVICE", "cpu")
TOLERANCE = {"rtol": 1.3e-6, "atol": 1e-5} if DEVICE == "cpu" else {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module", autouse=True)
def operators():
    torch.manual_seed(0)
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)
        return
    specification = importlib.util.spec_from_file_location("simulated_operators", OPERATORS)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)


def agree(name: str, tensors: list[torch.Tensor], *rest) -> None:
    results = []
    for function in (getattr(ascend, name), getattr(reference, name)):
        inputs = [t.clone().requires_grad_() for t in tensors]
        outputs = function(*inputs, *rest)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(sum((o * o).sum() for o in outputs), inputs)
        results.append([*outputs, *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, **TOLERANCE)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(offset):
    x, gain = torch.randn(3, 5, 24), torch.randn(24)
    agree("rms_norm", [x, gain], 1e-5, offset)


def test_swiglu_packed():
    agree("swiglu_packed", [torch.randn(4, 48)])


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary(mode):
    x, (cos, sin) = torch.randn(2, 3, 5, 16), torch.randn(2, 1, 5, 16)
    ours, expected = ascend.rotary(x, cos, sin, mode), reference.rotary(x, cos, sin, mode)
    torch.testing.assert_close(ours, expected, **TOLERANCE)
