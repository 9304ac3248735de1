"""A look at the machine before a run: what is there, what is missing, and what to do about it.

`python -m pipeline doctor [device=npu] [runs=FOLDER] [artifacts=FOLDER]` prints one row a fact and exits with 1 where
the device that is asked for cannot run.
"""

import os
import platform
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from pipeline.runtime.device import BACKENDS, Device, missing, open_device
from pipeline.runtime.disk import probe, size, space_free
from pipeline.runtime.track import logged_in

OK, WARNING, FAILS = "ok", "warning", "FAILS"
NEEDED = ("torch", "transformers", "deepspeed", "safetensors", "datasets", "hydra-core", "pydantic", "wandb")
# released with each other (Ascend's release notes); another pair may work
CANN_PAIRS = {
    "9.1": ("2.12.0", "2.11.0", "2.10.0.post4", "2.9.0.post6"),
    "9.0": ("2.10.0", "2.9.0.post2"),
    "8.5": ("2.9.0",),
}
SHARED_MEMORY = 1 << 30   # bytes of /dev/shm below which collectives between local ranks fail
DISK = 20 * 10**9         # bytes free below which a run of a mid-sized model does not fit
HCCL_PORTS = 32           # HCCL takes this many from its base port on
HCCL_BASE = 60000
INTERFACE = {"npu": "HCCL_SOCKET_IFNAME", "cuda": "NCCL_SOCKET_IFNAME", "cpu": "GLOO_SOCKET_IFNAME"}


@dataclass(frozen=True)
class Row:
    """One fact with its judgement; `remedy` says what to do where it is not ok."""

    name: str
    value: str
    state: str = OK
    remedy: str = ""


def doctor(arguments: list[str]) -> int:
    """Print the report for `name=value` arguments; give the exit code: 0, 1 if the device cannot run, 2 for misuse."""
    asked = {"device": "auto", "runs": "runs", "artifacts": "artifacts"}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in asked or not value:
            print(f"error: {argument!r} is not one of device=KIND, runs=FOLDER, artifacts=FOLDER")
            return 2
        asked[name] = value
    if asked["device"] not in ("auto", *BACKENDS):
        print(f"error: device is {asked['device']!r}; give one of auto, {', '.join(BACKENDS)}")
        return 2
    lines, ok = report(asked["device"], Path(asked["runs"]), Path(asked["artifacts"]))
    print("\n".join(lines))
    return 0 if ok else 1


def report(kind: str, runs: Path, artifacts: Path) -> tuple[list[str], bool]:
    """The report as lines of text, and whether a run on this kind of device can start."""
    rows = [*_software(), *_accelerators(kind), *_host(kind), *_folders(runs, artifacts), _monitoring()]
    ok = all(row.state != FAILS for row in rows)
    named = kind if kind != "auto" else next(name for name in BACKENDS if missing(name) is None)
    verdict = f"device {named} can run" if ok else f"device {named} cannot run: mend the rows marked {FAILS}"
    return [*table(rows), "", verdict], ok


def table(rows: list[Row]) -> list[str]:
    """The rows in columns, a remedy under each row that is not ok."""
    widths = [max(len(row.name) for row in rows), max(len(row.state) for row in rows)]
    lines = []
    for row in rows:
        lines.append(f"{row.state:<{widths[1]}}  {row.name:<{widths[0]}}  {row.value}")
        if row.state != OK and row.remedy:
            lines.append(f"{'':<{widths[1]}}  {'':<{widths[0]}}  -> {row.remedy}")
    return lines


def _software() -> Iterator[Row]:
    yield Row("python", platform.python_version())
    wanted = _requirements()
    for name in NEEDED:
        version = _version(name)
        if version is None:
            yield Row(name, "not installed", FAILS, f"pip install {wanted.get(name, name)}")
        elif name in wanted and not wanted[name].specifier.contains(version, prereleases=True):
            yield Row(name, version, WARNING, f"tested with {wanted[name].specifier}; install such a version")
        else:
            yield Row(name, version)


def _accelerators(kind: str) -> Iterator[Row]:
    npu_fault = missing("npu")
    if kind == "npu" or npu_fault is None:
        yield from _ascend(required=kind == "npu")
    for name in ("npu", "cuda"):
        fault = npu_fault if name == "npu" else missing(name)
        if fault and kind == name:
            yield Row(name, "cannot run", FAILS, fault)
        elif fault and "cannot be imported" in fault:
            yield Row(name, "absent", WARNING, fault)
        elif fault:
            yield Row(name, f"absent ({fault.split(';')[0]})")
        else:
            yield Row(name, "present")
    if kind in ("auto", "cpu") or missing(kind) is None:
        yield from _device(open_device(kind, "auto", False, 0, 0))


def _device(device: Device) -> Iterator[Row]:
    count = "" if device.kind == "cpu" else f" x {getattr(torch, device.kind).device_count()}"
    yield Row("chip", f"{device.name}{count}, {size(device.total_memory())} memory, collectives by {device.backend}")
    if device.compute_dtype == torch.bfloat16:
        yield Row("bfloat16", "native")
    else:
        yield Row("bfloat16", "not native: computing in float32", WARNING, "it works and takes several times as long")
    yield _computes(device)


def _computes(device: Device) -> Row:
    """Multiply on the device and on the host: a driver that does not fit its libraries shows here, not hours later."""
    left = torch.linspace(-1, 1, 64 * 128).reshape(64, 128)
    right = torch.linspace(1, -2, 128 * 32).reshape(128, 32)
    exact = left.double() @ right.double()
    try:
        found = left.to(device.torch, device.compute_dtype) @ right.to(device.torch, device.compute_dtype)
        device.synchronise()
        error = ((found.cpu().double() - exact).norm() / exact.norm()).item()
    except RuntimeError as fault:
        return Row("computes", "a small product failed", FAILS, (str(fault).splitlines() or ["?"])[0][:200])
    if error > 0.02:
        return Row("computes", f"a small product is wrong by {error:.1%}", FAILS, "check the driver and its libraries")
    return Row("computes", f"a small product is right to {error:.1e}")


def _ascend(required: bool) -> Iterator[Row]:
    torch_npu, pytorch = _version("torch_npu"), torch.__version__.split("+")[0]
    if torch_npu is None:
        yield Row("torch_npu", "not installed", WARNING, "pip install torch_npu in the version of torch, with its CANN")
    elif torch_npu.split(".")[:2] != pytorch.split(".")[:2]:
        yield Row("torch_npu", torch_npu, WARNING, f"its first two numbers must be those of torch ({pytorch})")
    else:
        yield Row("torch_npu", torch_npu)
    home = os.environ.get("ASCEND_HOME_PATH")
    if home is None:
        absent = FAILS if required else WARNING  # DeepSpeed reads it
        yield Row("CANN", "ASCEND_HOME_PATH is not set", absent, "source /usr/local/Ascend/ascend-toolkit/set_env.sh")
    else:
        yield _cann(Path(home), torch_npu)
    driver = Path("/usr/local/Ascend/driver/version.info")
    if driver.exists():
        yield Row("driver", _named(driver.read_text(), "Version") or "version.info names no version")
    else:
        yield Row("driver", f"{driver} is not here", WARNING, "mount the driver's folder into the container")
    cards = sorted(path.name for path in Path("/dev").glob("davinci[0-9]*"))
    if cards:
        yield Row("cards", ", ".join(cards))
    else:
        yield Row("cards", "no /dev/davinci*", WARNING, "pass the devices to the container; see npu-smi info")
    yield _ports()
    yield from _timeouts()


def _cann(home: Path, torch_npu: str | None) -> Row:
    places = (home / "version.cfg", home / "version.info", *sorted(home.glob("*-linux/ascend_toolkit_install.info")))
    found = next((path for path in places if path.exists()), None)
    if found is None:
        return Row("CANN", f"no version file under {home}", WARNING, "check that ASCEND_HOME_PATH is a CANN toolkit")
    text = found.read_text()
    numbers = re.search(r"(\d+\.\d+)[\w.]*", _named(text, "version") or text)
    version = numbers.group(0) if numbers else "unknown"
    pairs = CANN_PAIRS.get(numbers.group(1), ()) if numbers else ()
    if torch_npu is None or torch_npu in pairs:
        return Row("CANN", version)
    known = "; ".join(f"{cann} with {', '.join(wheels)}" for cann, wheels in CANN_PAIRS.items())
    return Row("CANN", version, WARNING, f"not a released pair with torch_npu {torch_npu}; released: {known}")


def _ports() -> Row:
    text = os.environ.get("HCCL_IF_BASE_PORT", str(HCCL_BASE))
    if not text.isdigit() or int(text) + HCCL_PORTS > 65536:
        return Row("HCCL ports", f"HCCL_IF_BASE_PORT is {text!r}", FAILS, f"set a port up to {65536 - HCCL_PORTS}")
    taken = [port for port in range(int(text), int(text) + HCCL_PORTS) if not _port_is_free(port)]
    if taken:
        remedy = f"set HCCL_IF_BASE_PORT to the first of {HCCL_PORTS} free ports, the same on every node"
        return Row("HCCL ports", f"from {text}: {', '.join(map(str, taken))} in use", WARNING, remedy)
    return Row("HCCL ports", f"{text} to {int(text) + HCCL_PORTS - 1} are free")


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _timeouts() -> Iterator[Row]:
    execute, event = os.environ.get("HCCL_EXEC_TIMEOUT", "1836"), os.environ.get("HCCL_EVENT_TIMEOUT")
    if event and event.isdigit() and execute.isdigit() and 0 < int(event) <= int(execute):
        value = f"HCCL_EVENT_TIMEOUT {event} s, HCCL_EXEC_TIMEOUT {execute} s"
        yield Row("HCCL timeouts", value, WARNING, "set HCCL_EVENT_TIMEOUT above HCCL_EXEC_TIMEOUT")


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
    for variable in (INTERFACE.values() if kind == "auto" else [INTERFACE[kind]]):
        named = os.environ.get(variable, "").lstrip("^=").split(",")
        wrong = [name for name in named if name and not any(other.startswith(name.split(":")[0]) for other in states)]
        if wrong:
            yield Row(variable, ", ".join(wrong), FAILS, f"no such interface; name one of {', '.join(up) or 'lo'}")


def _folders(runs: Path, artifacts: Path) -> Iterator[Row]:
    for name, folder in (("runs", runs), ("artifacts", artifacts)):
        try:
            probe(folder)
        except OSError as fault:
            yield Row(name, f"{folder}: {fault.strerror}", FAILS, f"set {name} to a folder where files can be locked")
            continue
        free = space_free(folder)
        state = OK if free >= DISK or name == "runs" else WARNING
        yield Row(name, f"{folder}: writable, {size(free)} free", state, "make room, or set artifacts to another disk")


def _monitoring() -> Row:
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return Row("W&B", f"{mode} (WANDB_MODE)")
    return Row("W&B", "online" if logged_in() else "offline: no credentials (`wandb login` gives them)")


def _requirements() -> dict[str, Requirement]:
    try:
        listed = metadata.requires("pangu-light") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {}
    parsed = [Requirement(text) for text in listed]
    return {requirement.name: requirement for requirement in parsed if requirement.marker is None}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _named(text: str, field: str) -> str | None:
    found = re.search(rf"^\W*{field}\w*\s*=\W*([\w.]+)", text, re.IGNORECASE | re.MULTILINE)
    return found.group(1) if found else None
