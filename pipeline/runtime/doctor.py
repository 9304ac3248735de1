"""A look at the machine before a run: what is there, what is missing, and what to do about it.

`python -m pipeline doctor [device=npu] [runs=FOLDER] [artifacts=FOLDER]` prints one row per fact and exits with 1 where
the chosen device cannot run.
"""

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from pipeline.runtime.device import BACKENDS, Device, missing, open_device
from pipeline.runtime.disk import probe, size, space_free
from pipeline.runtime.doctor_npu import ascend
from pipeline.runtime.findings import ABSENT, FAILS, OK, WARNING, Row, installed, table
from pipeline.runtime.track import logged_in

NEEDED = ("torch", "transformers", "deepspeed", "safetensors", "datasets", "hydra-core", "pydantic", "wandb")
SHARED_MEMORY = 1 << 30  # bytes of /dev/shm below which collectives between local ranks fail
DISK = 20 * 10**9  # bytes free below which a run of a mid-sized model does not fit
INTERFACE = {"npu": "HCCL_SOCKET_IFNAME", "cuda": "NCCL_SOCKET_IFNAME", "cpu": "GLOO_SOCKET_IFNAME"}


def doctor(arguments: list[str]) -> int:
    """Print the report for `name=value` arguments; return 0, 1 where the device cannot run, or 2 for misuse."""
    options = {"device": "auto", "runs": "runs", "artifacts": "artifacts"}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in options or not value:
            print(f"error: {argument!r} is not one of device=KIND, runs=FOLDER, artifacts=FOLDER")
            return 2
        options[name] = value
    if options["device"] not in ("auto", *BACKENDS):
        print(f"error: device is {options['device']!r}; choose one of auto, {', '.join(BACKENDS)}")
        return 2
    lines, ok = report(options["device"], Path(options["runs"]), Path(options["artifacts"]))
    print("\n".join(lines))
    return 0 if ok else 1


def report(kind: str, runs: Path, artifacts: Path) -> tuple[list[str], bool]:
    """Return the report as lines of text, and whether a run on this kind of device can start."""
    versions = {name: installed(name) for name in NEEDED}
    rows = [*software(versions), *_accelerators(kind), *_host(kind), *_folders(runs, artifacts), _monitoring()]
    ok = all(row.state != FAILS for row in rows)
    device = kind if kind != "auto" else next(name for name in BACKENDS if missing(name) is None)
    verdict = f"device {device} can run" if ok else f"device {device} cannot run: see the rows marked {FAILS}"
    return [*table(rows), "", verdict], ok


def software(versions: Mapping[str, str | None]) -> Iterator[Row]:
    """Yield a row for Python and each distribution, whose version is None where it is not installed."""
    yield Row("python", platform.python_version())
    required = _requirements()
    for name, version in versions.items():
        if version is None:
            yield Row(name, "not installed", FAILS, f"pip install {required.get(name, name)}")
        elif name in required and not required[name].specifier.contains(version, prereleases=True):
            yield Row(name, version, WARNING, f"tested with {required[name].specifier}; install such a version")
        else:
            yield Row(name, version)


def _accelerators(kind: str) -> Iterator[Row]:
    npu_fault = missing("npu")
    if kind == "npu" or npu_fault is None:
        yield from ascend(required=kind == "npu")
    for name in ("npu", "cuda"):
        fault = npu_fault if name == "npu" else missing(name)
        if fault and kind == name:
            yield Row(name, "cannot run", FAILS, fault)
        elif fault and "cannot be imported" in fault:
            yield Row(name, "not available", WARNING, fault)
        elif fault:
            yield Row(name, f"not available: {fault.split(';')[0]}", ABSENT)
        else:
            yield Row(name, "available")
    if kind in ("auto", "cpu") or missing(kind) is None:
        yield from _device(open_device(kind, "auto", False, 0, 0))


def _device(device: Device) -> Iterator[Row]:
    count = "" if device.kind == "cpu" else f" x {getattr(torch, device.kind).device_count()}"
    yield Row("chip", f"{device.name}{count}, {size(device.total_memory())} memory, collectives by {device.backend}")
    if device.compute_dtype == torch.bfloat16:
        yield Row("bfloat16", "native")
    else:
        yield Row("bfloat16", "not native: computing in float32", WARNING, "it works, several times slower")
    yield _computes(device)


def _computes(device: Device) -> Row:
    """Multiply on the device and on the host: this detects a driver that does not match its libraries."""
    left = torch.linspace(-1, 1, 64 * 128).reshape(64, 128)
    right = torch.linspace(1, -2, 128 * 32).reshape(128, 32)
    exact = left.double() @ right.double()
    try:
        product = left.to(device.torch, device.compute_dtype) @ right.to(device.torch, device.compute_dtype)
        device.synchronise()
        error = ((product.cpu().double() - exact).norm() / exact.norm()).item()
    except RuntimeError as failure:
        return Row("computes", "a small product failed", FAILS, (str(failure).splitlines() or ["?"])[0][:200])
    if error > 0.02:
        return Row("computes", f"a small product is wrong by {error:.1%}", FAILS, "check the driver and its libraries")
    return Row("computes", f"a small product is right to {error:.1e}")


def _host(kind: str) -> Iterator[Row]:
    memory = psutil.virtual_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Row("processor", f"{usable} of {os.cpu_count()} cores, {platform.machine()}")
    yield Row("memory", f"{size(memory.available)} free of {size(memory.total)}")
    shared = Path("/dev/shm")
    if shared.exists():
        total = shutil.disk_usage(shared).total
        state = OK if total >= SHARED_MEMORY else WARNING
        yield Row("shared memory", f"{size(total)} in /dev/shm", state, "start the container with --shm-size=16g")
    states = psutil.net_if_stats()
    up = sorted(name for name, state in states.items() if state.isup and name != "lo")
    yield Row("network", ", ".join(up) or "only the loopback interface: one node")
    for variable in INTERFACE.values() if kind == "auto" else [INTERFACE[kind]]:
        named = os.environ.get(variable, "").lstrip("^=").split(",")
        wrong = [name for name in named if name and not any(other.startswith(name.split(":")[0]) for other in states)]
        if wrong:
            yield Row(variable, ", ".join(wrong), FAILS, f"no such interface; name one of {', '.join(up) or 'lo'}")


def _folders(runs: Path, artifacts: Path) -> Iterator[Row]:
    for name, folder in (("runs", runs), ("artifacts", artifacts)):
        try:
            probe(folder)
        except OSError as error:
            yield Row(name, f"{folder}: {error.strerror}", FAILS, f"set {name} to a folder where files can be locked")
            continue
        free = space_free(folder)
        state = OK if free >= DISK or name == "runs" else WARNING
        yield Row(name, f"{folder}: writable, {size(free)} free", state, "make room, or set artifacts to another disk")


def _monitoring() -> Row:
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return Row("W&B", f"{mode} (WANDB_MODE)")
    if logged_in():
        return Row("W&B", "online")
    return Row("W&B", "runs are recorded offline: no credentials; `wandb login` stores them", ABSENT)


def _requirements() -> dict[str, Requirement]:
    try:
        listed = metadata.requires("pangu-light") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {}
    parsed = [Requirement(text) for text in listed]
    return {requirement.name: requirement for requirement in parsed if requirement.marker is None}
