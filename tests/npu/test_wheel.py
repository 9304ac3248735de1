"""The simulated torch_npu beside the real wheel: TORCH_NPU_WHEEL=FILE names one (pip download --no-deps torch_npu).

Its library and its sources are read; and over stubs of CANN's libraries, made here by gcc, it is imported.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
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
    assert len(ours) == 4
    assert [schema for schema in ours if b"\0" + schema.encode() + b"\0" not in library] == []


def test_every_operator_that_the_kernels_or_transformers_call_is_simulated():
    called = set(re.findall(r"torch\.ops\.npu\.(\w+)", KERNELS.read_text())) - {"*"}
    simulated = {schema.partition("(")[0] for schema in schemas((HERE / "package/torch_npu/ops.py").read_text())}
    assert called | {"npu_fusion_attention"} == simulated  # transformers imports that one by name


@needs_wheel
def test_every_function_of_the_simulated_device_module_is_a_real_one(wheel):
    real = wheel.read("torch_npu/npu/__init__.py").decode()
    ours = ast.parse((HERE / "package/torch_npu/npu.py").read_text())
    names = {node.name for node in ours.body if isinstance(node, ast.FunctionDef)} - {"_index", "_typed"}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", real)] == []


LINKED = ("libascendcl", "libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel")
CANN = re.compile(r" U ((?:acl|rt[A-Z]|Mspr)\w*)")  # functions of CANN that a library of the wheel wants


@pytest.fixture(scope="module")
def imported(wheel, tmp_path_factory):
    """What tests/npu/wheel.py says of the wheel over libraries whose every function does nothing and gives 0."""
    if not all(map(shutil.which, ("gcc", "nm"))):
        pytest.skip("stubs of CANN's libraries need gcc and nm")
    folder = tmp_path_factory.mktemp("wheel")
    wheel.extractall(folder)
    wanted = [*(folder / "torch_npu/lib").glob("*.so"), *(folder / "torch_npu").glob("_C*.so")]
    listed = [subprocess.run(["nm", "-D", str(file)], capture_output=True, text=True).stdout for file in wanted]
    names = sorted({name for text in listed for name in CANN.findall(text)})
    for library in LINKED:
        (folder / "stub.c").write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in names))
        named = ["-o", str(folder / f"{library}.so"), f"-Wl,-soname,{library}.so"]
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", str(folder / "stub.c"), *named], check=True)
        names = []  # the first library has them all
    places = {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "wheel.py")], env=os.environ | places, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@needs_wheel
def test_the_real_package_takes_our_calls_and_gives_what_we_expect(imported):
    x, half, query = ([[2, 5, 32], "torch.bfloat16"], [[2, 5, 16], "torch.bfloat16"], [[2, 4, 5, 16], "torch.bfloat16"])
    assert imported["schemas"] > 400
    assert imported["shapes"] == {
        "rms_norm": x, "swiglu_packed": half, "rotary half": query, "rotary interleave": query,
    }  # fmt: skip


@needs_wheel
def test_with_the_real_package_and_no_npu_the_reason_is_one_line(imported):
    assert imported["missing"] == "torch_npu finds no NPU; check npu-smi info and that /dev/davinci* is visible here"
