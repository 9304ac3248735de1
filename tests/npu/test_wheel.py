"""The simulated torch_npu beside the real wheel: TORCH_NPU_WHEEL=FILE names one (pip download --no-deps torch_npu).

The wheel cannot be imported without CANN, so its library and its sources are read, not run.
"""

import ast
import os
import re
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels/fused/ascend.py"

needs_wheel = pytest.mark.skipif("TORCH_NPU_WHEEL" not in os.environ, reason="TORCH_NPU_WHEEL names no torch_npu wheel")


@pytest.fixture(scope="module")
def wheel():
    with zipfile.ZipFile(os.environ["TORCH_NPU_WHEEL"]) as file:
        yield file


def schemas(text: str) -> set[str]:
    """The schemas of npu operators that a source defines, its string literals joined as Python joins them."""
    literals = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return {value for value in literals if isinstance(value, str) and re.match(r"npu_\w+\(.*\) -> ", value)}


@needs_wheel
def test_every_simulated_operator_has_the_real_schema(wheel):
    library = wheel.read("torch_npu/lib/libtorch_npu.so")
    ours = schemas((HERE / "package/torch_npu/ops.py").read_text())
    assert len(ours) == 5
    assert [schema for schema in ours if b"\0" + schema.encode() + b"\0" not in library] == []


def test_every_operator_that_the_kernels_call_is_simulated():
    called = set(re.findall(r"torch\.ops\.npu\.(\w+)", KERNELS.read_text())) - {"*"}
    simulated = {schema.partition("(")[0] for schema in schemas((HERE / "package/torch_npu/ops.py").read_text())}
    assert called == simulated


@needs_wheel
def test_every_function_of_the_simulated_device_module_is_a_real_one(wheel):
    real = wheel.read("torch_npu/npu/__init__.py").decode()
    ours = ast.parse((HERE / "package/torch_npu/npu.py").read_text())
    names = {node.name for node in ours.body if isinstance(node, ast.FunctionDef)} - {"_index", "_typed"}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", real)] == []
