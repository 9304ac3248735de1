"""Accelerators: which device this rank computes on, in what type, and how its memory is read.

Order of choice: Ascend NPU, then CUDA, then CPU. The rest of the pipeline is passed a `Device` and names devices by
tensors.
"""

import gc
import importlib
import os
import platform
import random
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import psutil
import torch

from pipeline.runtime.fused_layers import operators

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
# Part of a device's own name -> its file in conf/device/chip; a kind's first stands in for chips without one.
CHIPS = {
    "npu": {"910B3": "910B3", "910B1": "910B1", "910B2": "910B2", "910B4": "910B4", "910_93": "A3"},
    "cuda": {"H100": "H100"},
    "cpu": {"EPYC": "CPU"},
}
_hidden: dict[str, str] = {}  # module that cannot be imported -> why
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # /proc/cpuinfo flags of x86 and (the last) of Arm


Place: TypeAlias = torch.device  # in annotations of Device, whose field `torch` hides the module
Type: TypeAlias = torch.dtype


@dataclass(frozen=True)
class Device:
    """What one rank computes on: `name` is the chip's own, `backend` its collective library; memory is in bytes.

    `attention` is auto where the model's class decides: sdpa where it takes it, else eager (Gemma 2 caps its scores).
    `kernels`: auto (layers are computed by kernels/fused where it has more than a reference) or reference (never).
    """

    kind: str
    torch: Place
    backend: str
    compute_dtype: Type
    attention: str
    name: str
    kernels: str = "reference"

    def synchronise(self) -> None:
        """Wait until everything queued on the device has run."""
        if self.kind != "cpu":
            _module(self.kind).synchronize()

    def peak_memory(self) -> int:
        """Return the peak since the last reset: of the allocator, or on a CPU of the process's resident set."""
        if self.kind == "cpu":
            return _resident_peak()
        return _module(self.kind).max_memory_allocated()

    def reset_peak_memory(self) -> None:
        """Start a new peak; on a system whose kernel cannot reset it, the CPU peak stays that of the whole process."""
        if self.kind == "cpu":
            _reset_resident_peak()
        else:
            _module(self.kind).reset_peak_memory_stats()

    def total_memory(self) -> int:
        """Return the device's memory; on a CPU the machine's, or the container's limit where that is less."""
        if self.kind == "cpu":
            return min(psutil.virtual_memory().total, _container_limit())
        return _module(self.kind).get_device_properties(self.torch).total_memory

    def free_memory(self) -> int:
        """Return the unused memory, including what the allocator holds in reserve."""
        if self.kind == "cpu":
            return psutil.virtual_memory().available
        gc.collect()  # models of earlier stages
        module = _module(self.kind)
        kept = module.memory_reserved(self.torch) - module.memory_allocated(self.torch)
        return module.mem_get_info(self.torch)[0] + kept


def open_device(
    kind: str, attention: str, deterministic: bool, local_rank: int, seed: int, kernels: str = "reference"
) -> Device:
    """Choose this rank's device, make it current and seed every generator.

    Call it before DeepSpeed is imported: it sets DS_ACCELERATOR.
    ValueError where the kind cannot run here or has fewer devices than local ranks, or a kernel cannot run.
    """
    kind = choose(kind)
    operators(kernels, kind)
    os.environ["DS_ACCELERATOR"] = kind
    _determinism(kind, deterministic)
    if kind == "cpu":
        place = torch.device("cpu")
    else:
        count = _module(kind).device_count()
        if local_rank >= count:
            raise ValueError(
                f"local rank {local_rank} has no {kind} device: {count} visible; start at most {count} ranks on this"
                f" node, or widen {VISIBLE[kind]}"
            )
        place = torch.device(kind, local_rank)
        _module(kind).set_device(place)
    seed_all(seed)
    return Device(
        kind=kind,
        torch=place,
        backend=BACKENDS[kind],
        compute_dtype=torch.bfloat16 if bf16_is_native(kind) else torch.float32,
        attention=attention,
        name=chip_name(kind, local_rank),
        kernels=kernels,
    )


def choose(kind: str) -> str:
    """Return the kind of device a run uses; for auto the first this machine has. ValueError where it cannot run."""
    if kind == "auto":
        return next(candidate for candidate in BACKENDS if missing(candidate) is None)
    fault = missing(kind)
    if fault:
        raise ValueError(f"device.kind: {kind} cannot run: {fault}; or set device=auto to use what this machine has")
    return kind


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and every accelerator): the same on every rank, so that models start equal."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def missing(kind: str) -> str | None:
    """Return why this kind of device cannot run here, in one line; None where it can."""
    if kind == "cpu":
        return None
    if kind == "cuda":
        if torch.cuda.is_available():
            return None
        build = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU or no driver is visible"
        return f"{build}; check nvidia-smi, and install a torch built for your CUDA"
    return _missing_npu()


def bf16_is_native(kind: str) -> bool:
    """Return whether the device multiplies bfloat16 in hardware: a CPU by avx512_bf16, AMX or Arm's bf16."""
    if kind == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and multiplies_bf16(_processor_flags())
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _module(kind).is_bf16_supported()


def multiplies_bf16(flags: str) -> bool:
    """Return whether a processor with these /proc/cpuinfo flags has instructions that multiply bfloat16."""
    return not NATIVE_BF16.isdisjoint(flags.split())


def chip_name(kind: str, index: int) -> str:
    """Return the chip's own name, such as Ascend910B3."""
    if kind == "cpu":
        return _processor_field("model name") or platform.processor() or platform.machine()
    return _module(kind).get_device_name(index)


def chip_model(kind: str, name: str) -> tuple[str, str]:
    """Return the file of conf/device/chip that describes a device best, and a sentence that says so."""
    own = next((file for word, file in CHIPS[kind].items() if word in name), None)
    if own:
        return own, f"chip model: {own}, for {name}"
    other = next(iter(CHIPS[kind].values()))
    return other, f"chip model: {other} stands in for {name}; choose device/chip=NAME, or make one: calibrate-chip"


def kind_of_chip(file: str) -> str | None:
    """Return the kind of device that a file of conf/device/chip describes; None for a file of another name."""
    return next((kind for kind, files in CHIPS.items() if file in files.values()), None)


def _missing_npu() -> str | None:
    if "torch_npu" in _hidden:
        return _hidden["torch_npu"]
    try:
        importlib.import_module("torch_npu")
    except ModuleNotFoundError as fault:
        if fault.name != "torch_npu":
            return _broken_npu(fault)
        return "torch_npu is not installed; install the `npu` extra in an environment with CANN"
    except Exception as fault:  # without CANN the import dies in many ways: OSError, RuntimeError, KeyError, ...
        return _broken_npu(fault)
    if not _module("npu").is_available():
        return "torch_npu finds no NPU; check npu-smi info and that /dev/davinci* is visible here"
    return None


def _broken_npu(fault: Exception) -> str:
    """Return why torch_npu is broken; hide it from transformers and DeepSpeed, which import it unguarded."""
    sys.modules["torch_npu"] = None  # type: ignore[assignment]  # find_spec then answers "absent"
    reason = f"{type(fault).__name__}: {(str(fault).splitlines() or [''])[0]:.160}"
    _hidden["torch_npu"] = f"torch_npu cannot be imported ({reason}); source CANN's set_env.sh"
    return _hidden["torch_npu"]


def _module(kind: str):
    return getattr(torch, kind)


def _determinism(kind: str, deterministic: bool) -> None:
    if deterministic:  # both libraries read these once, when they start
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    if kind == "cuda":
        torch.backends.cudnn.benchmark = False
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports the compiler: seconds
        torch.use_deterministic_algorithms(deterministic)


def _processor_field(field: str) -> str:
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return ""
    for line in listing.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == field:
            return value.strip()
    return ""


def _processor_flags() -> str:
    return _processor_field("flags") or _processor_field("Features")


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:  # no procfs, or a container that forbids it: the peak stays that of the whole process
        return


def _container_limit() -> float:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(path)
        if limit.exists() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
            return int(text)
    return float("inf")


_missing_npu()  # on import: whoever imports transformers after this file is not stopped by a broken torch_npu
