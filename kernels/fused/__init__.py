"""The operations a pruned model spends its time in, and which implementation of each runs on which device."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

# What runs where unless the caller chooses. This is the whole choice: nothing is picked by probing, and an
# implementation that cannot run is an error, never a reason to take another one. Where the table says "reference", a
# model keeps the forward of its stock class (pipeline/runtime/fused_layers.py).
#   swiglu on an NPU: npu_swiglu reads one packed tensor; packing separate gate and up first moves more bytes than the
#   plain form does. kl_of_logits: torch_npu has no such operation, and triton-ascend is an install of its own (it takes
#   the place of the CUDA Triton), so there it is a choice, not the rule.
DEFAULT = {
    #                  cpu                  cuda                 npu
    "rms_norm":      {"cpu": "reference", "cuda": "triton",    "npu": "ascend"},
    "swiglu":        {"cpu": "reference", "cuda": "triton",    "npu": "reference"},
    "swiglu_packed": {"cpu": "reference", "cuda": "triton",    "npu": "ascend"},
    "rotary":        {"cpu": "reference", "cuda": "triton",    "npu": "ascend"},
    "kl_of_logits":  {"cpu": "reference", "cuda": "triton",    "npu": "reference"},
}  # fmt: skip

CHOICES = ("reference", "triton", "ascend")


def op(name: str, device_type: str, choice: str | None = None) -> Callable:
    """Return the function that computes `name` on tensors of a device type ("cpu", "cuda", "npu").

    `choice` overrides the table: "reference" (plain PyTorch, the meaning of the operation, every device), "triton"
    (cuda; npu with triton-ascend; cpu under TRITON_INTERPRET=1), "ascend" (npu). All implementations of one operation
    take the same arguments, described in `fused.reference`. ValueError where the choice cannot run: an unknown name, a
    device it does not serve, a package that is missing.
    """
    choice = chosen(name, device_type, choice)
    function = getattr(_module(choice), name, None)
    if function is None:
        raise ValueError(f"kernel {name} has no {choice} implementation; choose {DEFAULT[name][device_type]}")
    return function


def chosen(name: str, device_type: str, choice: str | None = None) -> str:
    """Return the name of the implementation that `op` takes; ValueError where it cannot run. Nothing is imported."""
    if name not in DEFAULT:
        raise ValueError(f"kernel {name} is unknown; the operations are {', '.join(DEFAULT)}")
    if device_type not in DEFAULT[name]:
        raise ValueError(f"kernel {name} has no implementation for device {device_type}; use cpu, cuda or npu")
    choice = DEFAULT[name][device_type] if choice is None else choice
    if choice not in CHOICES:
        raise ValueError(f"kernel {name}: implementation {choice} is unknown; choose one of {', '.join(CHOICES)}")
    reason = _obstacle(choice, device_type)
    if reason:
        raise ValueError(f"kernel {name}: {choice} cannot run on {device_type}: {reason}; or choose reference")
    return choice


def _obstacle(choice: str, device_type: str) -> str:
    """Return why an implementation cannot run on this device type here, with what would help; empty if it can."""
    if choice == "ascend":
        if device_type != "npu":
            return "it calls torch_npu operations; use device npu"
        if importlib.util.find_spec("torch_npu") is None:
            return "torch_npu is not installed; install the npu extra on a machine with CANN"
    if choice == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; install triton (for an NPU: triton-ascend)"
        if device_type == "npu" and importlib.util.find_spec("triton.backends.ascend") is None:
            return "the installed triton has no Ascend backend; install triton-ascend in its place"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton compiles for accelerators only; set TRITON_INTERPRET=1 to interpret it (slow, for tests)"
    return ""


def _module(choice: str) -> ModuleType:
    """Import and return the module that holds one implementation of each operation."""
    name = {"reference": "reference", "triton": "triton_all", "ascend": "ascend"}[choice]
    return importlib.import_module(f"fused.{name}")
