"""How every Triton kernel here is launched: one dimension of programs, as many as cores, each walking its share."""

import contextlib
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.budget import KERNELS, MAX_GRID

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PER_MULTIPROCESSOR = 8  # CUDA: programs that share one, to hide the latency of memory
PER_INTERPRETER = 3  # enough that every program takes several turns in a test


def programs(device: torch.device, jobs: int) -> int:
    """The size of the grid: the vector cores of an NPU, a few programs per multiprocessor, never more than the jobs."""
    if device.type == "npu":
        cores = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["num_vectorcore"]
    elif device.type == "cuda":
        cores = PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    else:
        cores = PER_INTERPRETER
    return max(1, min(jobs, cores, MAX_GRID))


def blocks(kernel: str, width: int) -> tuple[int, int]:
    """(elements of a block, elements of the row that fill whole blocks); the rest of the row is one masked block."""
    block = min(KERNELS[kernel].block, max(16, triton.next_power_of_2(width)))
    return block, width // block * block


def rows_of(x: Tensor) -> Tensor:
    """x [..., h] as [rows, h] with adjacent elements in the last axis; a copy only where the strides force one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def on(x: Tensor) -> contextlib.AbstractContextManager:
    """The device of x made current, which is where Triton launches."""
    return contextlib.nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device)


def check_inputs(op: str, *tensors: Tensor) -> None:
    """ValueError for what the kernels cannot compute: they work in float32, on one device."""
    first = tensors[0]
    if first.device.type == "cpu" and not INTERPRETED:
        raise ValueError(f"kernel {op}: triton got a CPU tensor; start with TRITON_INTERPRET=1 or use reference")
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"kernel {op}: triton computes in float32, got {tensor.dtype}; choose reference")
        if tensor.device != first.device:
            raise ValueError(f"kernel {op}: got tensors on {first.device} and {tensor.device}; put them on one device")


@triton.jit
def load(pointer, offsets, inside, MASKED: tl.constexpr):
    """A tile as float32; where a masked one is not `inside`, zeros."""
    if MASKED:
        values = tl.load(pointer + offsets, mask=inside, other=0.0)
    else:
        values = tl.load(pointer + offsets)
    return values.to(tl.float32)


@triton.jit
def store(pointer, offsets, values, inside, MASKED: tl.constexpr):
    """Write a float32 tile in the dtype of the memory, a masked one only `inside`."""
    if MASKED:
        tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=inside)
    else:
        tl.store(pointer + offsets, values.to(pointer.dtype.element_ty))
