"""RMSNorm in Triton, forward and backward.

A row is walked block by block, so its width is not bounded by the chip's buffer; only the last block is masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.triton_launch import blocks, check_inputs, load, on, programs, rows_of, store


@triton.jit
def _normalise(x, gain, y, inverse, columns, width, offset, MASKED: tl.constexpr):
    inside = columns < width
    values = load(x, columns, inside, MASKED)
    store(y, columns, values * inverse * (load(gain, columns, inside, MASKED) + offset), inside, MASKED)


@triton.jit
def rms_norm_forward(
    x, gain, y, inverses, rows, width, whole, x_stride, eps, offset, TAIL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y [rows, width] and inverses [rows] = 1 / rms. Reads a row twice; the second time it is in cache."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x_row = x + row * tl.cast(x_stride, tl.int64)
        y_row = y + row * tl.cast(width, tl.int64)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, whole, BLOCK):
            values = load(x_row, start + columns, True, False)
            squares += values * values
        if TAIL:
            values = load(x_row, whole + columns, whole + columns < width, True)
            squares += values * values
        inverse = tl.rsqrt(tl.sum(squares, 0) / width + eps)
        tl.store(inverses + row, inverse)
        for start in range(0, whole, BLOCK):
            _normalise(x_row, gain, y_row, inverse, start + columns, width, offset, False)
        if TAIL:
            _normalise(x_row, gain, y_row, inverse, whole + columns, width, offset, True)


@triton.jit
def _projected(dy, x, gain, columns, width, offset, MASKED: tl.constexpr):
    """dy · gain · x, whose sum over the row is what the norm takes out of the gradient."""
    inside = columns < width
    scaled = load(dy, columns, inside, MASKED) * (load(gain, columns, inside, MASKED) + offset)
    return scaled * load(x, columns, inside, MASKED)


@triton.jit
def _through(dy, x, gain, dx, inverse, pull, columns, width, offset, MASKED: tl.constexpr):
    inside = columns < width
    scaled = load(dy, columns, inside, MASKED) * (load(gain, columns, inside, MASKED) + offset)
    store(dx, columns, scaled * inverse - load(x, columns, inside, MASKED) * pull, inside, MASKED)


@triton.jit
def rms_norm_backward(
    dy, x, gain, inverses, dx, rows, width, whole, dy_stride, x_stride, offset,
    TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx [rows, width] = r·g·dy − x·r³·mean(g·dy·x), r = 1 / rms."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        dy_row = dy + row * tl.cast(dy_stride, tl.int64)
        x_row = x + row * tl.cast(x_stride, tl.int64)
        dx_row = dx + row * tl.cast(width, tl.int64)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, whole, BLOCK):
            products += _projected(dy_row, x_row, gain, start + columns, width, offset, False)
        if TAIL:
            products += _projected(dy_row, x_row, gain, whole + columns, width, offset, True)
        inverse = tl.load(inverses + row)
        pull = tl.sum(products, 0) / width * inverse * inverse * inverse
        for start in range(0, whole, BLOCK):
            _through(dy_row, x_row, gain, dx_row, inverse, pull, start + columns, width, offset, False)
        if TAIL:
            _through(dy_row, x_row, gain, dx_row, inverse, pull, whole + columns, width, offset, True)


@triton.jit
def _column_sums(
    dy, x, inverses, first, step, rows, dy_stride, x_stride, columns, width, MASKED: tl.constexpr
):  # fmt: skip
    inside = columns < width
    total = tl.zeros_like(columns).to(tl.float32)
    for row in range(first, rows, step):
        product = load(dy + row * tl.cast(dy_stride, tl.int64), columns, inside, MASKED)
        product *= load(x + row * tl.cast(x_stride, tl.int64), columns, inside, MASKED)
        total += product * tl.load(inverses + row)
    return total


@triton.jit
def gain_gradient(
    dy, x, inverses, partial, rows, width, whole, dy_stride, x_stride, splits, BLOCK: tl.constexpr
):  # fmt: skip
    """partial [splits, width] = Σ dy · x / rms over every splits-th row; the caller adds the splits."""
    slices = tl.cdiv(width, BLOCK)
    for job in range(tl.program_id(0), slices * splits, tl.num_programs(0)):
        split = job // slices
        start = (job % slices) * BLOCK
        columns = start + tl.arange(0, BLOCK)
        if start < whole:
            s = _column_sums(dy, x, inverses, split, splits, rows, dy_stride, x_stride, columns, width, False)
            store(partial + split * width, columns, s, columns < width, False)
        else:
            s = _column_sums(dy, x, inverses, split, splits, rows, dy_stride, x_stride, columns, width, True)
            store(partial + split * width, columns, s, columns < width, True)


def _sum_of_rows(dy: Tensor, x: Tensor, inverses: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a gain [h]; additions are in the same order every time."""
    count, width = x.shape
    block, whole = blocks("gain_gradient", width)
    slices = triton.cdiv(width, block)
    grid = programs(x.device, slices * count)
    splits = max(1, grid // slices)
    partial = torch.empty(splits, width, dtype=torch.float32, device=x.device)
    gain_gradient[(min(grid, slices * splits),)](
        dy, x, inverses, partial, count, width, whole, dy.stride(0), x.stride(0), splits, BLOCK=block
    )
    return partial.sum(0).to(dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, eps, offset):
        flat = rows_of(x)
        count, width = flat.shape
        block, whole = blocks("rms_norm_forward", width)
        y = torch.empty_like(flat, memory_format=torch.contiguous_format)
        inverses = torch.empty(count, dtype=torch.float32, device=x.device)
        with on(x):
            rms_norm_forward[(programs(x.device, count),)](
                flat, gain, y, inverses, count, width, whole, flat.stride(0), eps, offset,
                TAIL=whole < width, BLOCK=block,
            )  # fmt: skip
        ctx.save_for_backward(flat, gain, inverses)
        ctx.offset, ctx.shape = offset, x.shape
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, gain, inverses = ctx.saved_tensors
        dy = rows_of(dy)
        count, width = x.shape
        block, whole = blocks("rms_norm_backward", width)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        with on(x):
            rms_norm_backward[(programs(dx.device, count),)](
                dy, x, gain, inverses, dx, count, width, whole, dy.stride(0), x.stride(0), ctx.offset,
                TAIL=whole < width, BLOCK=block,
            )  # fmt: skip
            dgain = _sum_of_rows(dy, x, inverses, gain.dtype) if ctx.needs_input_grad[1] else None
        return dx.view(ctx.shape), dgain, None, None


def rms_norm(x: Tensor, gain: Tensor, eps: float, offset: float) -> Tensor:
    """As `fused.reference.rms_norm`."""
    check_inputs("rms_norm", x, gain)
    if gain.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: gain is {list(gain.shape)} for rows of {x.shape[-1]}; pass one number per element")
    return _RmsNorm.apply(x, gain.contiguous(), eps, offset)
