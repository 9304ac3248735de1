"""Build the simulated device once per source and torch version, and load it."""

import fcntl
import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
SOURCES = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")])
CACHE = HERE.parents[3] / "build" / "simulated-npu"
NAME = "simulated_npu"


def extension() -> ModuleType:
    """Return the compiled module; the first process builds it (needs g++ and ninja), the others wait."""
    content = b"".join(source.read_bytes() for source in SOURCES) + f"{torch.__version__} {sys.version}".encode()
    folder = CACHE / hashlib.sha256(content).hexdigest()[:12]
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
        return cpp_extension.load(NAME, [str(HERE / "module.cpp")], build_directory=str(folder), extra_cflags=["-O0"])
    finally:
        os.environ["PATH"] = path


def _load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
