"""Every operation in plain PyTorch: its meaning, and what the other implementations are compared with.

Arithmetic is float32 (float64 for float64 inputs) and results are rounded once, to the dtype of the first argument.
"""

import math

import torch
from torch import Tensor

KINDS = ("forward_kl", "reverse_kl", "jsd")


def rms_norm(x: Tensor, gain: Tensor, eps: float, offset: float) -> Tensor:
    """RMSNorm over the last axis: x / sqrt(mean(x²) + eps) · (offset + gain).

    x [..., h], gain [h]. `offset` is 1 for families that store the gain as 1 + w (Gemma), else 0.
    """
    wide = _wide(x)
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normalised * (gain.to(wide.dtype) + offset)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up. gate, up [..., f]."""
    wide = _wide(gate)
    return (torch.nn.functional.silu(wide) * up.to(wide.dtype)).to(gate.dtype)


def swiglu_packed(packed: Tensor) -> Tensor:
    """silu(first half) · second half of the last axis. packed [..., 2f] → [..., f]."""
    gate, up = packed.chunk(2, dim=-1)
    return swiglu(gate, up)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """Rotary position embedding: x · cos + partner(x) · sin.

    x [b, n, t, d] (heads before tokens), cos and sin [b or 1, t, d], one angle per element of the head. The partner of
    an element is the other of its pair, negated for the first: mode "half" pairs i with i + d/2 (Llama), "interleave"
    pairs 2i with 2i + 1 (GLM-4). cos and sin are positions, not parameters: they get no gradient.
    """
    wide = _wide(x)
    if mode == "half":
        first, second = wide.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    elif mode == "interleave":
        partner = torch.stack((-wide[..., 1::2], wide[..., 0::2]), dim=-1).flatten(-2)
    else:
        raise ValueError(f"rotary mode is {mode}; use half or interleave")
    turned = wide * cos.detach().unsqueeze(1).to(wide.dtype) + partner * sin.detach().unsqueeze(1).to(wide.dtype)
    return turned.to(x.dtype)


@torch.no_grad()
def kl_of_logits(
    student: Tensor, teacher: Tensor, kind: str, temperature: float, beta: float, scale: float
) -> Tensor:
    """Divergence of student from teacher, per token; **overwrites `student`** with its scaled gradient.

    student, teacher [t, v] finite logits → loss [t] (float32, or float64 for float64 logits); afterwards `student`
    holds scale · d loss[t] / d student[t], so that no second [t, v] tensor exists. A mean over t tokens with Hinton's
    factor wants scale T²/t, and T² on the loss: neither is applied here to the loss.
    With p = softmax(teacher / T), q = softmax(student / T), m = beta p + (1 - beta) q:
    "forward_kl" Σ p log(p/q), "reverse_kl" Σ q log(q/p), "jsd" beta Σ p log(p/m) + (1 - beta) Σ q log(q/m).
    """
    check_logits(student, teacher, kind, temperature, beta)
    log_p = torch.log_softmax(_wide(teacher) / temperature, dim=-1)
    log_q = torch.log_softmax(_wide(student) / temperature, dim=-1)
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        loss = (p * (log_p - log_q)).sum(-1)
        slope = q - p
    elif kind == "reverse_kl":
        loss = (q * (log_q - log_p)).sum(-1)
        slope = q * (log_q - log_p - loss[:, None])
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        towards = (q * (log_q - log_m)).sum(-1)  # [t], KL(q ‖ m)
        loss = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * towards
        slope = (1 - beta) * q * (log_q - log_m - towards[:, None])
    student.copy_(slope * (scale / temperature))
    return loss


def check_logits(student: Tensor, teacher: Tensor, kind: str, temperature: float, beta: float) -> None:
    """ValueError for what the divergence is not defined on."""
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(f"logits are {list(student.shape)} and {list(teacher.shape)}; give [tokens, vocabulary]")
    if student.requires_grad:
        raise ValueError("student logits require a gradient but are overwritten; pass them detached")
    if kind not in KINDS:
        raise ValueError(f"divergence kind is {kind}; use {', '.join(KINDS)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; give a positive number")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta is {beta}; jsd needs a number between 0 and 1")


def _wide(x: Tensor) -> Tensor:
    """x in the dtype that arithmetic is done in."""
    return x if x.dtype == torch.float64 else x.float()
