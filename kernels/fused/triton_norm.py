"""RMSNorm, residual addition with RMSNorm, and the static scale of an absorbed post-norm, in Triton.

A row is walked block by block, so its width is not bounded by the chip's buffer; only the last block is masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.triton_launch import blocks, check_inputs, load, on, programs, rows_of, store


@triton.jit
def _summed(x, residual, columns, width, ADD: tl.constexpr, MASKED: tl.constexpr):
    """x, or x + residual rounded as a separate addition rounds it."""
    inside = columns < width
    values = load(x, columns, inside, MASKED)
    if ADD:
        values = (values + load(residual, columns, inside, MASKED)).to(x.dtype.element_ty).to(tl.float32)
    return values


@triton.jit
def _normalise(
    x, residual, gain, y, total, inverse, columns, width, offset, ADD: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    inside = columns < width
    values = _summed(x, residual, columns, width, ADD, MASKED)
    if ADD:
        store(total, columns, values, inside, MASKED)
    store(y, columns, values * inverse * (load(gain, columns, inside, MASKED) + offset), inside, MASKED)


@triton.jit
def rms_norm_forward(
    x, residual, gain, y, total, inverses, rows, width, whole, x_stride, residual_stride, eps, offset,
    ADD: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y, total [rows, width] and inverses [rows] = 1 / rms. Reads a row twice; the second time it is in cache."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x_row = x + row * tl.cast(x_stride, tl.int64)
        residual_row = residual + row * tl.cast(residual_stride, tl.int64)
        out = row * tl.cast(width, tl.int64)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, whole, BLOCK):
            values = _summed(x_row, residual_row, start + columns, width, ADD, False)
            squares += values * values
        if TAIL:
            values = _summed(x_row, residual_row, whole + columns, width, ADD, True)
            squares += values * values
        inverse = tl.rsqrt(tl.sum(squares, 0) / width + eps)
        tl.store(inverses + row, inverse)
        for start in range(0, whole, BLOCK):
            at = start + columns
            _normalise(x_row, residual_row, gain, y + out, total + out, inverse, at, width, offset, ADD, False)
        if TAIL:
            at = whole + columns
            _normalise(x_row, residual_row, gain, y + out, total + out, inverse, at, width, offset, ADD, True)


@triton.jit
def _projected(dy, x, gain, columns, width, offset, MASKED: tl.constexpr):
    """dy · gain · x, whose sum over the row is what the norm takes out of the gradient."""
    inside = columns < width
    scaled = load(dy, columns, inside, MASKED) * (load(gain, columns, inside, MASKED) + offset)
    return scaled * load(x, columns, inside, MASKED)


@triton.jit
def _through(
    dy, dtotal, x, gain, dx, inverse, pull, columns, width, offset, ADD: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    inside = columns < width
    scaled = load(dy, columns, inside, MASKED) * (load(gain, columns, inside, MASKED) + offset)
    values = scaled * inverse - load(x, columns, inside, MASKED) * pull
    if ADD:
        values += load(dtotal, columns, inside, MASKED)
    store(dx, columns, values, inside, MASKED)


@triton.jit
def rms_norm_backward(
    dy, dtotal, x, gain, inverses, dx, rows, width, whole, dy_stride, dtotal_stride, x_stride, offset,
    ADD: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx [rows, width] = r·g·dy − x·r³·mean(g·dy·x), r = 1 / rms, plus the gradient that reached the sum itself."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        dy_row = dy + row * tl.cast(dy_stride, tl.int64)
        dtotal_row = dtotal + row * tl.cast(dtotal_stride, tl.int64)
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
            _through(dy_row, dtotal_row, x_row, gain, dx_row, inverse, pull, start + columns, width, offset, ADD, False)
        if TAIL:
            _through(dy_row, dtotal_row, x_row, gain, dx_row, inverse, pull, whole + columns, width, offset, ADD, True)


@triton.jit
def _column_sums(
    dy, x, inverses, first, step, rows, dy_stride, x_stride, columns, width, NORMED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    inside = columns < width
    total = tl.zeros_like(columns).to(tl.float32)
    for row in range(first, rows, step):
        product = load(dy + row * tl.cast(dy_stride, tl.int64), columns, inside, MASKED)
        product *= load(x + row * tl.cast(x_stride, tl.int64), columns, inside, MASKED)
        if NORMED:
            product *= tl.load(inverses + row)
        total += product
    return total


@triton.jit
def gain_gradient(
    dy, x, inverses, partial, rows, width, whole, dy_stride, x_stride, splits,
    NORMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [splits, width] = Σ dy · x (· 1/rms) over every splits-th row; the caller adds the splits."""
    slices = tl.cdiv(width, BLOCK)
    for job in range(tl.program_id(0), slices * splits, tl.num_programs(0)):
        split = job // slices
        start = (job % slices) * BLOCK
        columns = start + tl.arange(0, BLOCK)
        if start < whole:
            s = _column_sums(dy, x, inverses, split, splits, rows, dy_stride, x_stride, columns, width, NORMED, False)
            store(partial + split * width, columns, s, columns < width, False)
        else:
            s = _column_sums(dy, x, inverses, split, splits, rows, dy_stride, x_stride, columns, width, NORMED, True)
            store(partial + split * width, columns, s, columns < width, True)


@triton.jit
def _scaled(x, scale, y, columns, width, MASKED: tl.constexpr):
    inside = columns < width
    store(y, columns, load(x, columns, inside, MASKED) * load(scale, columns, inside, MASKED), inside, MASKED)


@triton.jit
def static_scale_rows(x, scale, y, rows, width, whole, x_stride, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """y [rows, width] = x · scale."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x_row = x + row * tl.cast(x_stride, tl.int64)
        y_row = y + row * tl.cast(width, tl.int64)
        for start in range(0, whole, BLOCK):
            _scaled(x_row, scale, y_row, start + columns, width, False)
        if TAIL:
            _scaled(x_row, scale, y_row, whole + columns, width, True)


def _sum_of_rows(dy: Tensor, x: Tensor, inverses: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a gain or a scale [h]; the same order of additions every time."""
    count, width = x.shape
    block, whole = blocks("gain_gradient", width)
    slices = triton.cdiv(width, block)
    grid = programs(x.device, slices * count)
    splits = max(1, grid // slices)
    partial = torch.empty(splits, width, dtype=torch.float32, device=x.device)
    gain_gradient[(min(grid, slices * splits),)](
        dy, x, partial if inverses is None else inverses, partial, count, width, whole,
        dy.stride(0), x.stride(0), splits, NORMED=inverses is not None, BLOCK=block,
    )  # fmt: skip
    return partial.sum(0).to(dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, gain, eps, offset):
        add = residual is not None
        flat, other = rows_of(x), rows_of(residual if add else x)
        count, width = flat.shape
        block, whole = blocks("rms_norm_forward", width)
        y = torch.empty_like(flat, memory_format=torch.contiguous_format)
        total = torch.empty_like(y) if add else flat
        inverses = torch.empty(count, dtype=torch.float32, device=x.device)
        with on(x):
            rms_norm_forward[(programs(x.device, count),)](
                flat, other, gain, y, total, inverses, count, width, whole,
                flat.stride(0), other.stride(0), eps, offset, ADD=add, TAIL=whole < width, BLOCK=block,
            )  # fmt: skip
        ctx.save_for_backward(total, gain, inverses)
        ctx.offset, ctx.add, ctx.shape = offset, add, x.shape
        return y.view(x.shape), total.view(x.shape) if add else None

    @staticmethod
    def backward(ctx, dy, dtotal):
        total, gain, inverses = ctx.saved_tensors
        dy = rows_of(dy)
        dtotal = rows_of(dtotal) if ctx.add else dy
        count, width = total.shape
        block, whole = blocks("rms_norm_backward", width)
        dx = torch.empty_like(total, memory_format=torch.contiguous_format)
        with on(total):
            rms_norm_backward[(programs(dx.device, count),)](
                dy, dtotal, total, gain, inverses, dx, count, width, whole,
                dy.stride(0), dtotal.stride(0), total.stride(0), ctx.offset,
                ADD=ctx.add, TAIL=whole < width, BLOCK=block,
            )  # fmt: skip
            dgain = _sum_of_rows(dy, total, inverses, gain.dtype) if ctx.needs_input_grad[2] else None
        dx = dx.view(ctx.shape)
        return dx, dx if ctx.add else None, dgain, None, None


class _StaticScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return _multiply(x, scale)

    @staticmethod
    def backward(ctx, dy):
        x, scale = ctx.saved_tensors
        with on(x):
            dscale = _sum_of_rows(rows_of(dy), rows_of(x), None, scale.dtype) if ctx.needs_input_grad[1] else None
        return _multiply(dy, scale), dscale


def _multiply(x: Tensor, scale: Tensor) -> Tensor:
    flat = rows_of(x)
    count, width = flat.shape
    block, whole = blocks("static_scale_rows", width)
    y = torch.empty_like(flat, memory_format=torch.contiguous_format)
    with on(x):
        static_scale_rows[(programs(x.device, count),)](
            flat, scale, y, count, width, whole, flat.stride(0), TAIL=whole < width, BLOCK=block
        )
    return y.view(x.shape)


def rms_norm(x: Tensor, gain: Tensor, eps: float, offset: float) -> Tensor:
    """As `fused.reference.rms_norm`."""
    check_inputs("rms_norm", x, gain)
    _check_width("rms_norm gain", gain, x)
    return _RmsNorm.apply(x, None, gain.contiguous(), eps, offset)[0]


def add_rms_norm(x: Tensor, residual: Tensor, gain: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """As `fused.reference.add_rms_norm`; x and residual share shape and dtype."""
    check_inputs("add_rms_norm", x, residual, gain)
    _check_width("add_rms_norm gain", gain, x)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"add_rms_norm: residual is {residual.dtype} {list(residual.shape)}; give {x.dtype}, as x")
    return _RmsNorm.apply(x, residual, gain.contiguous(), eps, offset)


def static_scale(x: Tensor, scale: Tensor) -> Tensor:
    """As `fused.reference.static_scale`."""
    check_inputs("static_scale", x, scale)
    _check_width("static_scale scale", scale, x)
    return _StaticScale.apply(x, scale.contiguous())


def _check_width(name: str, vector: Tensor, x: Tensor) -> None:
    if vector.shape != x.shape[-1:]:
        raise ValueError(f"{name} is {list(vector.shape)} for rows of {x.shape[-1]}; give one number per element")
