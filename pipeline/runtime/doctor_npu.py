"""The doctor's look at an Ascend host: torch, torch_npu and CANN as a released set, triton, driver, cards, HCCL."""

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.runtime.findings import FAILS, WARNING, Row, installed
from pipeline.runtime.versions import (
    AS_OF,
    ASCEND_INDEX,
    CPU_INDEX,
    RELEASES,
    TORCH_NPU,
    TRITON_ASCEND,
    install_lines,
    torch_of,
)

HCCL_PORTS = 32  # HCCL takes this many from its base port on
HCCL_BASE = 60000


def ascend(required: bool) -> Iterator[Row]:
    """Yield the rows of an Ascend host; `required`: the user wants to run on the NPU."""
    torch_npu, home = installed("torch_npu"), os.environ.get("ASCEND_HOME_PATH")
    cann = None if home is None else cann_version(Path(home))
    if home is None:
        state = FAILS if required else WARNING  # DeepSpeed reads it
        yield Row("CANN", "ASCEND_HOME_PATH is not set", state, "source CANN's set_env.sh in this shell")
    elif cann is None:
        yield Row("CANN", f"no version file under {home}", WARNING, "set ASCEND_HOME_PATH to a CANN toolkit")
    else:
        yield Row("CANN", cann)
    yield from software_set(torch.__version__, torch.version.cuda, torch_npu, cann)
    yield from triton_rows(installed("triton"), installed("triton-ascend"), cann)
    driver = Path("/usr/local/Ascend/driver/version.info")
    if driver.exists():
        yield Row("driver", _named(driver.read_text(encoding="utf-8"), "Version") or "version.info names no version")
    else:
        yield Row("driver", f"{driver} does not exist", WARNING, "mount the driver's folder into the container")
    cards = sorted(path.name for path in Path("/dev").glob("davinci[0-9]*"))
    if cards:
        yield Row("cards", ", ".join(cards))
    else:
        yield Row("cards", "no /dev/davinci*", WARNING, "pass the devices to the container; see npu-smi info")
    yield ports()
    yield from _timeouts()


def software_set(pytorch: str, cuda: str | None, torch_npu: str | None, cann: str | None) -> Iterator[Row]:
    """Compare the installed torch, torch_npu and CANN with the released sets; the remedy is what to install.

    `pytorch`: torch.__version__; `cuda`: torch.version.cuda.
    """
    fitting = [release for release in RELEASES if cann is None or release.fits(cann)]
    wheels = [wheel for release in fitting for wheel in release.torch_npu]
    wanted = TORCH_NPU if TORCH_NPU in wheels or not wheels else wheels[0]
    remedy = "; ".join(install_lines(torch_npu if torch_npu in wheels else wanted))
    base = pytorch.partition("+")[0]
    if cuda is not None:
        yield Row("torch", f"{pytorch} is a CUDA build", WARNING, f"install the build of {CPU_INDEX}: {remedy}")
    if torch_npu is None:
        yield Row("torch_npu", "not installed", WARNING, remedy)
    elif torch_of(torch_npu) != base:
        yield Row("torch_npu", f"{torch_npu}, made for torch {torch_of(torch_npu)}, not {base}", WARNING, remedy)
    elif torch_npu not in wheels:
        value = f"{torch_npu} is in no released set{f' with CANN {cann}' if cann else ''} (as of {AS_OF})"
        yield Row("torch_npu", value, WARNING, f"{remedy}; or, if {cann or 'your CANN'} can change, {_sets()}")
    else:
        yield Row("torch_npu", torch_npu)


def triton_rows(triton: str | None, triton_ascend: str | None, cann: str | None) -> Iterator[Row]:
    """Compare the installed Triton with CANN's; without one the kernels' reference implementations run."""
    if triton is None and triton_ascend is None:
        return
    wanted = next((version for start, version in TRITON_ASCEND.items() if cann and cann.startswith(start)), None)
    line = f"pip uninstall -y triton triton-ascend; pip install --no-deps --index-url {ASCEND_INDEX} triton-ascend"
    if triton is not None and triton_ascend is not None:
        yield Row("triton", f"triton {triton} beside triton-ascend", WARNING, f"{line}=={wanted or triton_ascend}")
    elif triton is not None:
        remedy = f"{line}=={wanted}" if wanted else "pip uninstall -y triton"
        yield Row("triton", f"triton {triton} is not made for Ascend", WARNING, remedy)
    elif wanted and triton_ascend != wanted:
        yield Row("triton", f"triton-ascend {triton_ascend} on CANN {cann}", WARNING, f"{line}=={wanted}")
    else:
        yield Row("triton", f"triton-ascend {triton_ascend}")


def cann_version(home: Path) -> str | None:
    """Return the version of the CANN toolkit at a folder, as its version files name it."""
    places = (home / "version.cfg", home / "version.info", *sorted(home.glob("*-linux/ascend_toolkit_install.info")))
    path = next((path for path in places if path.exists()), None)
    if path is None:
        return None
    text = path.read_text(errors="replace", encoding="utf-8")
    numbers = re.search(r"\d+\.\d+(\.\w+)*", _named(text, "version") or text)
    return numbers.group(0) if numbers else None


def ports() -> Row:
    """Return whether HCCL's ports are free."""
    text = os.environ.get("HCCL_IF_BASE_PORT", str(HCCL_BASE))
    if not (text.isascii() and text.isdigit()) or int(text) + HCCL_PORTS > 65536:
        return Row("HCCL ports", f"HCCL_IF_BASE_PORT is {text!r}", FAILS, f"set a port up to {65536 - HCCL_PORTS}")
    taken = [port for port in range(int(text), int(text) + HCCL_PORTS) if not _port_is_free(port)]
    if taken:
        remedy = f"set HCCL_IF_BASE_PORT to the first of {HCCL_PORTS} free ports, the same on every node"
        return Row("HCCL ports", f"from {text}: {', '.join(map(str, taken))} in use", WARNING, remedy)
    return Row("HCCL ports", f"{text} to {int(text) + HCCL_PORTS - 1} are free")


def _sets() -> str:
    known = (f"CANN {release.cann} with torch_npu {', '.join(release.torch_npu)}" for release in RELEASES)
    return f"choose from the released sets: {'; '.join(known)}"


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


def _named(text: str, field: str) -> str | None:
    match = re.search(rf"^\W*{field}\w*\s*=\W*([\w.]+)", text, re.IGNORECASE | re.MULTILINE)
    return match.group(1) if match else None
