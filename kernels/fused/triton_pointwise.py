"""SwiGLU and the rotary position embedding in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.budget import KERNELS
from fused.triton_launch import blocks, check_inputs, load, on, programs, rows_of, store


@triton.jit
def _gated(gate, up, y, columns, width, MASKED: tl.constexpr):
    inside = columns < width
    values = load(gate, columns, inside, MASKED)
    store(y, columns, values * tl.sigmoid(values) * load(up, columns, inside, MASKED), inside, MASKED)


@triton.jit
def swiglu_forward(
    gate, up, y, rows, width, whole, gate_stride, up_stride, TAIL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y [rows, width] = silu(gate) · up; gate and up may be the two halves of one packed tensor."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        gate_row = gate + row * tl.cast(gate_stride, tl.int64)
        up_row = up + row * tl.cast(up_stride, tl.int64)
        y_row = y + row * tl.cast(width, tl.int64)
        for start in range(0, whole, BLOCK):
            _gated(gate_row, up_row, y_row, start + columns, width, False)
        if TAIL:
            _gated(gate_row, up_row, y_row, whole + columns, width, True)


@triton.jit
def _ungated(dy, gate, up, dgate, dup, columns, width, MASKED: tl.constexpr):
    inside = columns < width
    slope = load(dy, columns, inside, MASKED)
    values = load(gate, columns, inside, MASKED)
    open_ = tl.sigmoid(values)
    store(dup, columns, slope * values * open_, inside, MASKED)
    slope *= load(up, columns, inside, MASKED) * open_
    store(dgate, columns, slope * (1.0 + values * (1.0 - open_)), inside, MASKED)


@triton.jit
def swiglu_backward(
    dy, gate, up, dgate, dup, rows, width, whole, dy_stride, gate_stride, up_stride, out_stride,
    TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate, dup [rows, width]: with s = sigmoid(gate), dy·up·s·(1 + gate·(1 − s)) and dy·gate·s."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        dy_row = dy + row * tl.cast(dy_stride, tl.int64)
        gate_row = gate + row * tl.cast(gate_stride, tl.int64)
        up_row = up + row * tl.cast(up_stride, tl.int64)
        out = row * tl.cast(out_stride, tl.int64)
        for start in range(0, whole, BLOCK):
            _ungated(dy_row, gate_row, up_row, dgate + out, dup + out, start + columns, width, False)
        if TAIL:
            _ungated(dy_row, gate_row, up_row, dgate + out, dup + out, whole + columns, width, True)


@triton.jit
def rotary_tiles(
    x, cos, sin, y, jobs, heads, tokens, x_batch, x_head, x_token, turn_batch, PAIRS: tl.constexpr,
    BACKWARD: tl.constexpr, INTERLEAVE: tl.constexpr, MASKED: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """y [b, n, t, d] = x turned by cos, sin [b or 1, t, d]; BACKWARD: its transpose. One job: TOKENS of a head."""
    tiles = tl.cdiv(tokens, TOKENS)
    pairs = tl.arange(0, SPAN)[None, :]
    if INTERLEAVE:
        first, second = 2 * pairs, 2 * pairs + 1
    else:
        first, second = pairs, pairs + PAIRS
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        head = job // tiles % heads
        batch = job // tiles // heads
        positions = (job % tiles) * TOKENS + tl.arange(0, TOKENS)[:, None]
        inside = positions < tokens
        if SPAN > PAIRS:
            inside = inside & (pairs < PAIRS)
        source = x + batch * tl.cast(x_batch, tl.int64) + head * tl.cast(x_head, tl.int64) + positions * x_token
        turn = batch * turn_batch + positions * (2 * PAIRS)
        left, right = load(source, first, inside, MASKED), load(source, second, inside, MASKED)
        left_cos, right_cos = load(cos + turn, first, inside, MASKED), load(cos + turn, second, inside, MASKED)
        left_sin, right_sin = load(sin + turn, first, inside, MASKED), load(sin + turn, second, inside, MASKED)
        if BACKWARD:
            upper, lower = left * left_cos + right * right_sin, right * right_cos - left * left_sin
        else:
            upper, lower = left * left_cos - right * left_sin, right * right_cos + left * right_sin
        out = y + (batch * heads + head) * tl.cast(tokens * 2 * PAIRS, tl.int64) + positions * (2 * PAIRS)
        store(out, first, upper, inside, MASKED)
        store(out, second, lower, inside, MASKED)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    flat, other = rows_of(gate), rows_of(up)
    count, width = flat.shape
    block, whole = blocks("swiglu_forward", width)
    y = torch.empty(count, width, dtype=gate.dtype, device=gate.device)
    with on(gate):
        swiglu_forward[(programs(gate.device, count),)](
            flat, other, y, count, width, whole, flat.stride(0), other.stride(0), TAIL=whole < width, BLOCK=block
        )
    return y.view(gate.shape)


def _ungate(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Fill dgate and dup [rows, f], views with one common row stride."""
    dy, gate, up = rows_of(dy), rows_of(gate), rows_of(up)
    count, width = gate.shape
    block, whole = blocks("swiglu_backward", width)
    with on(gate):
        swiglu_backward[(programs(gate.device, count),)](
            dy, gate, up, dgate, dup, count, width, whole,
            dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), TAIL=whole < width, BLOCK=block,
        )  # fmt: skip


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _gate(gate, up)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        flat = (gate.numel() // gate.shape[-1], gate.shape[-1])
        dgate, dup = (torch.empty(flat, dtype=t.dtype, device=t.device) for t in (gate, up))
        _ungate(dy, gate, up, dgate, dup)
        return dgate.view(gate.shape), dup.view(up.shape)


class _SwigluPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed):
        ctx.save_for_backward(packed)
        return _gate(*packed.chunk(2, dim=-1))

    @staticmethod
    def backward(ctx, dy):
        (packed,) = ctx.saved_tensors
        dpacked = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
        _ungate(dy, *packed.chunk(2, dim=-1), *rows_of(dpacked).chunk(2, dim=-1))
        return dpacked


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleave):
        ctx.save_for_backward(cos, sin)
        ctx.interleave = interleave
        return _turn(x, cos, sin, interleave, backward=False)

    @staticmethod
    def backward(ctx, dy):
        return _turn(dy, *ctx.saved_tensors, ctx.interleave, backward=True), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool, backward: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, size = x.shape
    pairs = size // 2
    span = triton.next_power_of_2(pairs)
    tile = max(1, min(triton.next_power_of_2(tokens), KERNELS["rotary_tiles"].block // span))
    jobs = batch * heads * triton.cdiv(tokens, tile)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on(x):
        rotary_tiles[(programs(x.device, jobs),)](
            x, cos, sin, y, jobs, heads, tokens, *x.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, PAIRS=pairs,
            BACKWARD=backward, INTERLEAVE=interleave, MASKED=tokens % tile > 0 or span > pairs, TOKENS=tile, SPAN=span,
        )  # fmt: skip
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `fused.reference.swiglu`."""
    check_inputs("swiglu", gate, up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate is {list(gate.shape)}, up is {list(up.shape)}; give equal shapes")
    return _Swiglu.apply(gate, up)


def swiglu_packed(packed: Tensor) -> Tensor:
    """As `fused.reference.swiglu_packed`."""
    check_inputs("swiglu_packed", packed)
    if packed.shape[-1] % 2:
        raise ValueError(f"swiglu_packed: the last axis has {packed.shape[-1]} elements; give gate and up of one width")
    return _SwigluPacked.apply(packed)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """As `fused.reference.rotary`."""
    check_inputs("rotary", x, cos, sin)
    if mode not in ("half", "interleave"):
        raise ValueError(f"rotary mode is {mode}; use half or interleave")
    batch, _, tokens, size = x.shape
    if cos.shape != sin.shape or cos.shape[1:] != (tokens, size) or len(cos) not in (1, batch):
        raise ValueError(f"rotary: cos is {list(cos.shape)} and sin {list(sin.shape)}; give [1, {tokens}, {size}]")
    if tokens * max(x.stride(2), size) >= 2**31:
        raise ValueError(f"rotary: {tokens} tokens, {x.stride(2)} elements apart, pass 2³¹; give fewer tokens")
    return _Rotary.apply(x, cos.detach().contiguous(), sin.detach().contiguous(), mode == "interleave")
