"""Forward KL, reverse KL and JSD between two sets of logits, with the gradient in place, in Triton.

One program owns a token's row. The first walk over the vocabulary finds both softmaxes' maxima and sums online (and,
for the two KLs, the divergence itself); JSD needs a second for its mixture; the last writes the gradient.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.reference import check_logits
from fused.triton_launch import blocks, check_inputs, load, on, programs, rows_of, store


@triton.jit
def _logits(pointer, columns, width, cold, MASKED: tl.constexpr):
    """A block of logits over temperature; beyond the vocabulary a number whose exponential is zero."""
    inside = columns < width
    values = load(pointer, columns, inside, MASKED) * cold
    if MASKED:
        values = tl.where(inside, values, -1.0e30)
    return values


@triton.jit
def _gather(
    student, teacher, columns, width, cold, s_max, s_sum, t_max, t_sum, cross, KIND: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """One block into the running maxima, sums of exponentials and Σ exp · (difference of logits)."""
    s = _logits(student, columns, width, cold, MASKED)
    t = _logits(teacher, columns, width, cold, MASKED)
    s_new, t_new = tl.maximum(s_max, tl.max(s, 0)), tl.maximum(t_max, tl.max(t, 0))
    s_old, t_old = tl.exp(s_max - s_new), tl.exp(t_max - t_new)
    s_exp, t_exp = tl.exp(s - s_new), tl.exp(t - t_new)
    if KIND == "forward_kl":
        cross = cross * t_old + tl.sum(t_exp * (t - s), 0)
    if KIND == "reverse_kl":
        cross = cross * s_old + tl.sum(s_exp * (s - t), 0)
    return s_new, s_sum * s_old + tl.sum(s_exp, 0), t_new, t_sum * t_old + tl.sum(t_exp, 0), cross


@triton.jit
def _mixed(log_p, log_q, log_beta, log_rest):
    """log(beta p + (1 - beta) q) without leaving the logarithm."""
    p, q = log_p + log_beta, log_q + log_rest
    return tl.maximum(p, q) + tl.log(1.0 + tl.exp(-tl.abs(p - q)))


@triton.jit
def _from_mixture(
    student, teacher, columns, width, cold, s_norm, t_norm, log_beta, log_rest, MASKED: tl.constexpr
):  # fmt: skip
    """One block's part of KL(p ‖ m) and KL(q ‖ m)."""
    log_q = _logits(student, columns, width, cold, MASKED) - s_norm
    log_p = _logits(teacher, columns, width, cold, MASKED) - t_norm
    log_m = _mixed(log_p, log_q, log_beta, log_rest)
    return tl.sum(tl.exp(log_p) * (log_p - log_m), 0), tl.sum(tl.exp(log_q) * (log_q - log_m), 0)


@triton.jit
def _slope(
    student, teacher, columns, width, cold, s_norm, t_norm, centre, factor, log_beta, log_rest,
    KIND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Overwrite one block of student logits with factor · d loss / d (student / T)."""
    inside = columns < width
    log_q = _logits(student, columns, width, cold, MASKED) - s_norm
    log_p = _logits(teacher, columns, width, cold, MASKED) - t_norm
    if KIND == "forward_kl":
        slope = tl.exp(log_q) - tl.exp(log_p)
    elif KIND == "reverse_kl":
        slope = tl.exp(log_q) * (log_q - log_p - centre)
    else:
        slope = tl.exp(log_q + log_rest) * (log_q - _mixed(log_p, log_q, log_beta, log_rest) - centre)
    store(student, columns, slope * factor, inside, MASKED)


@triton.jit
def kl_of_logits_rows(
    student, teacher, loss, rows, width, whole, student_stride, teacher_stride, cold, factor, beta, log_beta, log_rest,
    KIND: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss [rows]; student [rows, width] becomes factor · d loss / d (student / T); cold = 1 / T."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        s_row = student + row * tl.cast(student_stride, tl.int64)
        t_row = teacher + row * tl.cast(teacher_stride, tl.int64)
        s_max, t_max, s_sum, t_sum, cross = -1.0e30, -1.0e30, 0.0, 0.0, 0.0
        for start in range(0, whole, BLOCK):
            s_max, s_sum, t_max, t_sum, cross = _gather(
                s_row, t_row, start + columns, width, cold, s_max, s_sum, t_max, t_sum, cross, KIND, False
            )
        if TAIL:
            s_max, s_sum, t_max, t_sum, cross = _gather(
                s_row, t_row, whole + columns, width, cold, s_max, s_sum, t_max, t_sum, cross, KIND, True
            )
        s_norm, t_norm = s_max + tl.log(s_sum), t_max + tl.log(t_sum)
        if KIND == "forward_kl":
            divergence = cross / t_sum - t_norm + s_norm
            centre = 0.0
        elif KIND == "reverse_kl":
            divergence = cross / s_sum - s_norm + t_norm
            centre = divergence
        else:
            left, right = 0.0, 0.0
            for start in range(0, whole, BLOCK):
                towards_p, towards_q = _from_mixture(
                    s_row, t_row, start + columns, width, cold, s_norm, t_norm, log_beta, log_rest, False
                )
                left, right = left + towards_p, right + towards_q
            if TAIL:
                towards_p, towards_q = _from_mixture(
                    s_row, t_row, whole + columns, width, cold, s_norm, t_norm, log_beta, log_rest, True
                )
                left, right = left + towards_p, right + towards_q
            divergence = beta * left + (1.0 - beta) * right
            centre = right
        tl.store(loss + row, divergence)
        for start in range(0, whole, BLOCK):
            at = start + columns
            _slope(s_row, t_row, at, width, cold, s_norm, t_norm, centre, factor, log_beta, log_rest, KIND, False)
        if TAIL:
            at = whole + columns
            _slope(s_row, t_row, at, width, cold, s_norm, t_norm, centre, factor, log_beta, log_rest, KIND, True)


@torch.no_grad()
def kl_of_logits(
    student: Tensor, teacher: Tensor, kind: str, temperature: float, beta: float, scale: float
) -> Tensor:
    """As `fused.reference.kl_of_logits`."""
    check_logits(student, teacher, kind, temperature, beta)
    check_inputs("kl_of_logits", student, teacher)
    if student.stride(1) != 1:
        raise ValueError(f"student logits have strides {student.stride()}; give adjacent logits, they are overwritten")
    teacher = rows_of(teacher)
    count, width = student.shape
    block, whole = blocks("kl_of_logits_rows", width)
    loss = torch.empty(count, dtype=torch.float32, device=student.device)
    share = beta if kind == "jsd" else 0.5
    factor = scale / temperature
    with on(student):
        kl_of_logits_rows[(programs(student.device, count),)](
            student, teacher, loss, count, width, whole,
            student.stride(0), teacher.stride(0), 1 / temperature, factor, share, math.log(share), math.log1p(-share),
            KIND=kind, TAIL=whole < width, BLOCK=block,
        )  # fmt: skip
    return loss
