"""Attention through PyTorch's own fused kernels (CPU and CUDA)."""

import torch
from torch import Tensor

from fused.reference import check_attention, later_positions


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, masked: Tensor | None) -> Tensor:
    """As `fused.reference.attention`; a mask is inverted, because here True means seen."""
    check_attention(query, key, causal, masked)
    square = query.shape[2] == key.shape[2]
    if causal and not square:  # PyTorch's own causal flag counts from the first key
        masked = later_positions(query.shape[2], key.shape[2], query.device)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=None if masked is None else ~masked, scale=scale,
        is_causal=causal and square, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
