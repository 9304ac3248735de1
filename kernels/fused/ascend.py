"""The operations torch_npu brings, with its own argument names; schemas as in torch_npu 2.13.0.

They are called as `torch.ops.npu.*`, which is what `torch_npu.*` wraps: importing torch_npu registers them.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from fused.reference import check_attention

if importlib.util.find_spec("torch_npu") is not None:
    import torch_npu  # noqa: F401  (registers the operations)

TEMPLATE = 2048  # side of the mask that stands for a causal mask of any size in the compressed modes
FULL_MASK, CAUSAL_FROM_FIRST, CAUSAL_FROM_LAST = 0, 2, 3  # sparse_mode


def rms_norm(x: Tensor, gain: Tensor, eps: float, offset: float) -> Tensor:
    """As `fused.reference.rms_norm`."""
    return torch.ops.npu.npu_rms_norm(x, _gamma(gain, offset, x.dtype), epsilon=eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, gain: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """As `fused.reference.add_rms_norm`."""
    gamma = _gamma(gain, offset, x.dtype)
    normalised, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, gamma, epsilon=eps)
    return normalised, total


def swiglu_packed(packed: Tensor) -> Tensor:
    """As `fused.reference.swiglu_packed`."""
    return torch.ops.npu.npu_swiglu(packed, dim=-1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """As `fused.reference.rotary`. The schema calls cos and sin `r1` and `r2`, so they go by position."""
    if mode not in ("half", "interleave"):
        raise ValueError(f"rotary mode is {mode}; use half or interleave")
    turn = (cos.detach().unsqueeze(1).to(x.dtype), sin.detach().unsqueeze(1).to(x.dtype))
    return torch.ops.npu.npu_rotary_mul(x, *turn, rotary_mode=mode)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, masked: Tensor | None) -> Tensor:
    """As `fused.reference.attention`."""
    arguments = fusion_arguments(query, key, value, scale, causal, masked)
    return torch.ops.npu.npu_fusion_attention(**arguments)[0]


def fusion_arguments(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, masked: Tensor | None
) -> dict[str, Any]:
    """The arguments of npu_fusion_attention for one attention call.

    Its mask says True = not seen, as ours. A causal mask is never built at full size: sparse_mode 2 (counting from the
    first key) and 3 (from the last) both read the 2048 × 2048 template. Grouped KV heads need no repetition.
    """
    check_attention(query, key, causal, masked)
    arguments = {
        "query": query, "key": key, "value": value, "head_num": query.shape[1], "input_layout": "BNSD", "scale": scale,
    }  # fmt: skip
    if causal:
        mode = CAUSAL_FROM_FIRST if query.shape[2] == key.shape[2] else CAUSAL_FROM_LAST
        return arguments | {"atten_mask": causal_template(query.device), "sparse_mode": mode}
    if masked is None:
        return arguments
    shape = (*masked.shape[:-2], query.shape[2], key.shape[2])  # the operation broadcasts batch and heads only
    return arguments | {"atten_mask": masked.expand(shape).contiguous(), "sparse_mode": FULL_MASK}


@functools.cache
def causal_template(device: torch.device) -> Tensor:
    """bool [2048, 2048], True above the diagonal; one per device."""
    return torch.ones(TEMPLATE, TEMPLATE, dtype=torch.bool, device=device).triu(1)


def _gamma(gain: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """The gain as the operation multiplies it, in the dtype of the input; 1 + w is added in float32."""
    return (gain.float() + offset).to(dtype)
