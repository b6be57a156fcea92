"""The codec decoder's layers above frame rate, for training on a GPU, time first: [n, time, channels].

cuDNN trains convolutions of few channels over long signals at a fraction of the memory's speed. These
kernels read each activation about once. They compute what `CausalConv`, `SnakeBeta` and `CausalUpsample`
of `codec.layers` do for a stream that begins, in bf16 with float32 sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_T = 128
_BLOCK_C = 64
_SPLITS = 512


@triton.jit(do_not_specialize=["length", "dilation"])
def _conv_kernel(
    x: tl.tensor, w: tl.tensor, bias: tl.tensor, residual: tl.tensor, y: tl.tensor,
    length: int, dilation: int,
    C: tl.constexpr, OUT: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
) -> None:  # fmt: skip
    """y[t] = sum over taps of x[t - SIGN (TAPS - 1 - tap) dilation] w[tap]. w is [TAPS, C, OUT]."""
    blocks = tl.cdiv(length, BT)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * BT + tl.arange(0, BT)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    total = tl.zeros((BT, BO), tl.float32)
    for part in range(TAPS * (C // BC)):  # not unrolled, because unrolling takes seconds to compile
        tap = part // (C // BC)
        c = part % (C // BC) * BC + tl.arange(0, BC)
        at = t - SIGN * (TAPS - 1 - tap) * dilation
        known = (at >= 0) & (at < length)
        a = tl.load(x + (n * length + at[:, None]) * C + c[None], known[:, None], 0.0)
        b = tl.load(w + (tap * C + c[:, None]) * OUT + o[None])
        total = tl.dot(a, b, total)
    where = (n * length + t[:, None]) * OUT + o[None]
    if HAS_BIAS:
        total += tl.load(bias + o)[None]
    if HAS_RESIDUAL:
        total += tl.load(residual + where, t[:, None] < length, 0.0).to(tl.float32)
    tl.store(y + where, total.to(y.dtype.element_ty), t[:, None] < length)


@triton.jit(do_not_specialize=["length", "rows", "dilation", "steps"])
def _weight_kernel(
    x: tl.tensor, g: tl.tensor, out: tl.tensor, length: int, rows: int, dilation: int, steps: int,
    C: tl.constexpr, OUT: tl.constexpr, TAPS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
) -> None:  # fmt: skip
    """Parts of dw[tap] = sum over rows of x[row - shift]' g[row]. out is [splits, TAPS, C, OUT]."""
    split, tap = tl.program_id(0), tl.program_id(1)
    c = (tl.program_id(2) // (OUT // BO)) * BC + tl.arange(0, BC)
    o = (tl.program_id(2) % (OUT // BO)) * BO + tl.arange(0, BO)
    shift = (TAPS - 1 - tap) * dilation
    total = tl.zeros((BC, BO), tl.float32)
    for step in range(steps):
        row = (split * steps + step) * BM + tl.arange(0, BM)
        known = (row < rows) & (row % length >= shift)
        a = tl.load(x + (row[None].to(tl.int64) - shift) * C + c[:, None], known[None], 0.0)
        b = tl.load(g + row[:, None].to(tl.int64) * OUT + o[None], (row < rows)[:, None], 0.0)
        total = tl.dot(a, b, total)
    where = (split * TAPS + tap) * C * OUT + c[:, None] * OUT + o[None]
    tl.store(out + where, total)


@triton.jit(do_not_specialize=["size"])
def _snake_kernel(
    x: tl.tensor, frequency: tl.tensor, strength: tl.tensor, y: tl.tensor, size: int,
    C: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < size, 0.0).to(tl.float32)
    wave = tl.sin(value * tl.load(frequency + at % C))
    tl.store(
        y + at, (value + wave * wave * tl.load(strength + at % C)).to(y.dtype.element_ty), at < size
    )


@triton.jit(do_not_specialize=["rows", "steps"])
def _snake_gradient_kernel(
    x: tl.tensor, g: tl.tensor, frequency: tl.tensor, strength: tl.tensor, dx: tl.tensor,
    parts: tl.tensor, rows: int, steps: int, C: tl.constexpr, BM: tl.constexpr,
) -> None:  # fmt: skip
    """dx, and the sums over this program's rows for frequency and strength. parts is [programs, 2,
    C]."""
    c = tl.arange(0, C)
    f, s = tl.load(frequency + c)[None], tl.load(strength + c)[None]
    df, ds = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * BM + tl.arange(0, BM)
        at, known = row[:, None].to(tl.int64) * C + c[None], (row < rows)[:, None]
        value = tl.load(x + at, known, 0.0).to(tl.float32)
        grad = tl.load(g + at, known, 0.0).to(tl.float32)
        wave, slope = tl.sin(value * f), tl.sin(2 * value * f)
        tl.store(dx + at, (grad * (1 + s * f * slope)).to(dx.dtype.element_ty), known)
        df += tl.sum(grad * s * value * slope, 0)
        ds += tl.sum(grad * wave * wave, 0)
    tl.store(parts + tl.program_id(0) * 2 * C + c, df)
    tl.store(parts + tl.program_id(0) * 2 * C + C + c, ds)


def _block(channels: int, most: int) -> int:
    """The largest power of 2, up to `most`, that divides `channels`."""
    return min(channels & -channels, most)


def _convolve(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, dilation: int, sign: int,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    n, length, c = x.shape
    taps, _, o = w.shape
    y = x.new_empty(n, length, o, dtype=dtype or x.dtype)
    block_o = _block(o, 128)
    grid = (n * triton.cdiv(length, _BLOCK_T), o // block_o)
    _conv_kernel[grid](
        x, w, x if bias is None else bias, x if residual is None else residual, y, length, dilation,
        c, o, taps, sign, bias is not None, residual is not None, _BLOCK_T, _block(c, _BLOCK_C), block_o,
    )  # fmt: skip
    return y


def _weight_gradient(x: Tensor, g: Tensor, taps: int, dilation: int) -> Tensor:
    """float32 [taps, c, o]."""
    n, length, c = x.shape
    o, block_m = g.shape[2], 64
    block_c, block_o = _block(c, 64), _block(o, 128)
    tiles = taps * (c // block_c) * (o // block_o)
    rows = n * length
    splits = max(1, min(_SPLITS // tiles * 2, triton.cdiv(rows, block_m)))
    steps = triton.cdiv(rows, block_m * splits)
    parts = torch.empty(splits, taps, c, o, device=x.device)
    grid = (splits, taps, (c // block_c) * (o // block_o))
    _weight_kernel[grid](
        x, g, parts, length, rows, dilation, steps, c, o, taps, block_m, block_c, block_o
    )
    return parts.sum(0)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, dilation, dtype):  # noqa: ANN001, ANN205
        w = weight.permute(2, 1, 0).to(x.dtype).contiguous()
        ctx.save_for_backward(x, w)
        ctx.dilation, ctx.has_bias, ctx.has_residual = dilation, bias is not None, residual is not None
        return _convolve(x, w, bias, residual, dilation, 1, dtype)

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        x, w = ctx.saved_tensors
        g = g.to(x.dtype).contiguous()
        dx = _convolve(g, w.transpose(1, 2).contiguous(), None, None, ctx.dilation, -1)
        dw = _weight_gradient(x, g, len(w), ctx.dilation).permute(2, 1, 0)
        db = g.sum((0, 1), dtype=torch.float32) if ctx.has_bias else None
        return dx, dw, db, g if ctx.has_residual else None, None, None


class _Snake(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, frequency, strength):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, frequency, strength)
        y, block = torch.empty_like(x), 1024
        _snake_kernel[(triton.cdiv(x.numel(), block),)](
            x, frequency, strength, y, x.numel(), x.shape[2], block
        )
        return y

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        x, frequency, strength = ctx.saved_tensors
        g = g.contiguous()
        c, rows, dx = x.shape[2], x.shape[0] * x.shape[1], torch.empty_like(x)
        block = max(1, 2048 // c)
        programs = min(1056, triton.cdiv(rows, block))
        steps = triton.cdiv(rows, block * programs)
        parts = torch.empty(programs, 2, c, device=x.device)
        _snake_gradient_kernel[(programs,)](x, g, frequency, strength, dx, parts, rows, steps, c, block)
        df, ds = parts.sum(0)
        return dx, df, ds


def compile_kernels(c: int, o: int, taps: int) -> None:
    """Compile the kernels of a layer: a convolution, or a snake if `taps` is 0."""
    x = torch.zeros(1, 16, c, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    if not taps:
        zeros = torch.zeros(c, device="cuda", requires_grad=True)
        snake(x, zeros, zeros).sum().backward()
        return
    weight = torch.zeros(o, c, taps, device="cuda", requires_grad=True)
    bias, residual = torch.zeros(o, device="cuda"), torch.zeros_like(x) if taps == 1 else None
    convolve(x, weight, bias, residual=residual).sum().backward()
    if c == o == 16 and taps > 1:  # the last convolution
        convolve(x, weight, bias, dtype=torch.float32).sum().backward()


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int = 1,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Causal convolution of [n, time, c], contiguous bf16. c is a multiple of 16.

    Args:
        x: the input. Zeros come before it.
        weight: float32 [o, c, taps]. o is a multiple of 16.
        bias: float32 [o].
        dilation: steps between taps.
        residual: [n, time, o], added to the result.
        dtype: of the result. None is the input's.
    """
    return _Conv.apply(x, weight, bias, residual, dilation, dtype)


def upsample(x: Tensor, weight: Tensor, bias: Tensor, factor: int) -> Tensor:
    """Causal transposed convolution [n, time, c] -> [n, time * factor, o], as a convolution of two taps.

    `weight` is float32 [c, o, 2 * factor]. Each of a step's `factor` outputs sees that step and the one
    before it.
    """
    phases = weight.unflatten(2, (2, factor)).flip(2)  # [c, o, oldest first, phase]
    y = convolve(x, phases.permute(3, 1, 0, 2).flatten(0, 1), bias.repeat(factor))
    return y.unflatten(2, (factor, -1)).flatten(1, 2)


def snake(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """SnakeBeta of [n, time, c], contiguous. alpha and beta are float32 [c]. c is a power of 2."""
    return _Snake.apply(x, alpha.exp(), (beta.exp() + 1e-9).reciprocal())
