"""The operations torch_npu brings, with its own argument names; schemas as in torch_npu 2.13.0.

They are called as `torch.ops.npu.*`, which is what `torch_npu.*` wraps: importing torch_npu registers them.
"""

import importlib.util

import torch
from torch import Tensor

if importlib.util.find_spec("torch_npu") is not None:
    import torch_npu  # noqa: F401  (registers the operations)


def rms_norm(x: Tensor, gain: Tensor, eps: float, offset: float) -> Tensor:
    """As `fused.reference.rms_norm`."""
    return torch.ops.npu.npu_rms_norm(x, _gamma(gain, offset, x.dtype), epsilon=eps)[0]


def swiglu_packed(packed: Tensor) -> Tensor:
    """As `fused.reference.swiglu_packed`."""
    return torch.ops.npu.npu_swiglu(packed, dim=-1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """As `fused.reference.rotary`. The schema calls cos and sin `r1` and `r2`, so they are passed by position."""
    if mode not in ("half", "interleave"):
        raise ValueError(f"rotary mode is {mode}; use half or interleave")
    turn = (cos.detach().unsqueeze(1).to(x.dtype), sin.detach().unsqueeze(1).to(x.dtype))
    return torch.ops.npu.npu_rotary_mul(x, *turn, rotary_mode=mode)


def _gamma(gain: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """The gain as the operation multiplies it, in the dtype of the input; 1 + w is added in float32."""
    return (gain.float() + offset).to(dtype)
