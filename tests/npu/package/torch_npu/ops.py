"""The fused operators `torch.ops.npu.*` that the project calls: torch_npu's schemas, computed by plain PyTorch.

Schemas are those of torch_npu 2.13.0; what a call may not do on the real operator is refused where it is known.
"""

import torch
from torch import Tensor, library

TEMPLATE = 2048  # side of the mask of the compressed sparse modes


def _operator(schema: str):
    def register(function):
        name, bracket, rest = schema.partition("(")
        library.define(f"npu::{name}", bracket + rest)
        library.impl(f"npu::{name}", "CompositeImplicitAutograd", function)
        return function

    return register


@_operator("npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)")
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    wide = input.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


@_operator("npu_swiglu(Tensor input, int dim=-1) -> Tensor")
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


@_operator("npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor")
def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    if rotary_mode == "half":
        low, high = input.chunk(2, -1)
        turned = torch.cat((-high, low), -1)
    else:
        turned = torch.stack((-input[..., 1::2], input[..., ::2]), -1).flatten(-2)
    return input * r1 + turned * r2


@_operator(
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None,"
    " Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1.,"
    " int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None,"
    " int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True,"
    ' bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0,'
    " int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)"
)
def npu_fusion_attention(
    query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0,
    pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0, prefix=None, actual_seq_qlen=None,
    actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False, softmax_layout="", sink=None,
    dropout_mask=None, seed=0, offset=0,
):  # fmt: skip
    """Attention of [batch, head, position, size]; a True in the mask hides, and head groups share keys."""
    if input_layout != "BNSD" or keep_prob != 1.0 or head_num != query.shape[1]:
        raise NotImplementedError("the simulated npu_fusion_attention knows BNSD without dropout only")
    length, keys = query.shape[2], key.shape[2]
    if sparse_mode in (2, 3):
        if atten_mask is None or tuple(atten_mask.shape[-2:]) != (TEMPLATE, TEMPLATE):
            raise RuntimeError(f"npu_fusion_attention: sparse_mode {sparse_mode} wants a {TEMPLATE} x {TEMPLATE} mask")
        diagonal = 1 if sparse_mode == 2 else 1 + keys - length
        hidden = torch.ones(length, keys, dtype=torch.bool, device=query.device).triu(diagonal)
    else:
        hidden = None if atten_mask is None else atten_mask.bool()
    repeats = head_num // key.shape[1]
    wide_key, wide_value = (t.float().repeat_interleave(repeats, 1) for t in (key, value))
    scores = query.float() @ wide_key.transpose(-1, -2) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    maximum = scores.amax(-1, keepdim=True).detach()
    total = (scores - maximum).exp().sum(-1, keepdim=True)
    attended = scores.softmax(-1) @ wide_value
    return attended.to(query.dtype), maximum, total, query.new_empty(0), 0, 0, 0
