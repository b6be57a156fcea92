"""Linear layers and convolutions for one frame at a time on a CPU: fast, and the same in any batch.

BLAS and oneDNN are made for large batches. With the few columns of a frame they take slow paths: a
transposed convolution of four steps takes ten times as long as the product that computes it. Their
rounding also depends on how many streams share a call. Here every such layer is a plain product of
windows and weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW = 16
"""Up to this many steps, windows are the rows of a product. With more steps, they are its columns."""


def linear_by_stream(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose result for a stream does not depend on how many streams there are.

    BLAS libraries take other code paths for other row counts, and round differently. On a CPU each
    stream is multiplied alone, which is also fastest for one stream. On a GPU the backend gives every
    frame the same number of rows.

    Args:
        x: [streams, ..., in].
        weight, bias: [out, in], [out].

    Returns:
        [streams, ..., out].
    """
    if x.device.type != "cpu" or x.shape[0] == 1:
        return F.linear(x, weight, bias)
    return torch.cat([F.linear(stream, weight, bias) for stream in x.split(1)])


def add_by_stream(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`total + linear_by_stream(x, weight)` in one operation.

    Args:
        total: [streams, t, out].
        x: [streams, t, in].
        weight: [out, in].
    """
    if x.device.type != "cpu":
        return torch.addmm(total.flatten(0, 1), x.flatten(0, 1), weight.T).view_as(total)
    sums = [torch.addmm(of, add, weight.T) for of, add in zip(total.unbind(), x.unbind(), strict=True)]
    return torch.stack(sums) if len(sums) > 1 else sums[0][None]


def convolve(x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1) -> Tensor:
    """`F.conv1d`.

    Args:
        x: [n, in, length].
        weight, bias: [out, in, taps], [out].
        dilation: steps between taps.

    Returns:
        [n, out, length - (taps - 1) * dilation].
    """
    windows = _windows(x, weight.shape[2], dilation)
    if windows.shape[3] <= _FEW:
        rows = windows.permute(0, 3, 1, 2).flatten(2)
        return linear_by_stream(rows, weight.flatten(1), bias).transpose(1, 2)
    matrix = weight.flatten(1).expand(len(x), -1, -1)
    return torch.baddbmm(bias[:, None], matrix, windows.flatten(1, 2))


def convolve_channels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv1d` of each channel alone. x is [n, channels, length], weight [channels, 1, taps]."""
    windows = x.unfold(2, weight.shape[2], 1)
    return torch.matmul(windows, weight.transpose(1, 2)).squeeze(-1) + bias[:, None]


def upsampling_matrix(weight: Tensor, factor: int) -> Tensor:
    """Lay out a transposed convolution's weight [in, out, taps * factor] for `upsample`.

    Returns:
        [factor, out, taps, in]. The last tap is that of the newest step.
    """
    return weight.unflatten(2, (-1, factor)).flip(2).permute(3, 1, 2, 0).contiguous()


def upsample(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """`F.conv_transpose1d` with a stride of `factor`, without the steps that lack a part of their input.

    Args:
        x: [n, in, taps - 1 + steps].
        matrix: from `upsampling_matrix`.
        bias: [out].

    Returns:
        [n, out, steps * factor].
    """
    factor, out, taps, _ = matrix.shape
    windows = _windows(x, taps, 1).transpose(1, 2)  # [n, taps, in, steps]
    steps = windows.shape[3]
    if steps <= _FEW:
        rows = windows.permute(0, 3, 1, 2).flatten(2)
        y = linear_by_stream(rows, matrix.flatten(0, 1).flatten(1), bias.repeat(factor))
        return y.view(len(x), steps * factor, out).transpose(1, 2)
    product = matrix.flatten(0, 1).flatten(1).expand(len(x), -1, -1)
    y = torch.baddbmm(bias.repeat(factor)[:, None], product, windows.flatten(1, 2))
    return y.view(len(x), factor, out, steps).permute(0, 2, 3, 1).flatten(2)


def _windows(x: Tensor, taps: int, dilation: int) -> Tensor:
    """The inputs of each step of x [n, channels, length], as a view [n, channels, taps, steps]."""
    n, channels, length = x.shape
    batch, channel, step = x.stride()
    shape = (n, channels, taps, length - (taps - 1) * dilation)
    return x.as_strided(shape, (batch, channel, step * dilation, step))
