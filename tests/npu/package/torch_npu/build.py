"""Build the simulated device once per source and torch version, and load it."""

import fcntl
import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(__file__).resolve().parents[4] / "build" / "simulated-npu"
NAME = "simulated_npu"


def extension() -> ModuleType:
    """Give the compiled module; processes that come first build it (needs g++ and ninja), the others wait for them."""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {sys.version}".encode()).hexdigest()[:12]
    folder = CACHE / key
    library = folder / f"{NAME}.so"
    if library.exists():
        return _load(library)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _load(library) if library.exists() else _compile(folder)


def _compile(folder: Path) -> ModuleType:
    from torch.utils import cpp_extension

    path = os.environ["PATH"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"  # where pip puts ninja
    try:
        return cpp_extension.load(NAME, [str(SOURCE)], build_directory=str(folder), extra_cflags=["-O0"])
    finally:
        os.environ["PATH"] = path


def _load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
