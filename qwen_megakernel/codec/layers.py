"""Streaming layers of the codec: convolutions that continue where they stopped, and their state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_megakernel.model.batch_invariant import (
    convolve,
    convolve_channels,
    upsample,
    upsampling_matrix,
)


class Recurrent(nn.Module):
    """A layer that reads the end of its earlier input, its history, before the new input."""

    history_shape: tuple[int, int]
    """Shape of one slot's history: that of the input with time, without the batch."""
    time_dim: int
    """The dimension of time in a batched input."""


class SlotStates:
    """The codec states of the slots of one call, in the order of the call.

    All reads and writes go through a tensor of slot numbers. So shapes depend only on the number of
    slots and frames, and the same launches serve any slots.
    """

    def __init__(self, histories: dict[Recurrent, Tensor], frame_counts: Tensor, slots: Tensor) -> None:
        self._histories = histories
        self._slots = slots
        self.frame_counts = frame_counts.index_select(0, slots)
        """Frames decoded before this call, int64 [n]."""

    def extend(self, layer: Recurrent, new: Tensor) -> Tensor:
        """Returns `layer`'s history followed by `new`. The end of the result becomes the history."""
        history = self._histories.get(layer)
        if history is None:
            return new
        dim, length = layer.time_dim, history.shape[layer.time_dim]
        both = torch.cat((history.index_select(0, self._slots), new), dim)
        history.index_copy_(0, self._slots, both.narrow(dim, both.shape[dim] - length, length))
        return both


def takes_products(x: Tensor) -> bool:
    """Whether convolutions run as products (`batch_invariant`). They do on a CPU, except in training,
    which keeps all intermediate values."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


class CausalConv(Recurrent):
    """Convolution over the present and the past, [n, channels, time]."""

    time_dim = 2

    def __init__(
        self, inputs: int, outputs: int, kernel: int, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, groups=groups)
        self.history_shape = (inputs, (kernel - 1) * dilation)

    def forward(self, x: Tensor, states: SlotStates) -> Tensor:
        """x: [n, inputs, time]. Returns [n, outputs, time]. The end of x becomes the history."""
        x = states.extend(self, x)
        if not takes_products(x):
            return self.conv(x)
        if self.conv.groups > 1:
            return convolve_channels(x, self.conv.weight, self.conv.bias)
        return convolve(x, self.conv.weight, self.conv.bias, self.conv.dilation[0])


class CausalUpsample(Recurrent):
    """Transposed convolution, [n, inputs, time] -> [n, outputs, time * factor].

    Neighbouring steps overlap in the output. The history has the inputs that still reach into the next
    output, not half-summed outputs. So each sample is summed in one place, with its bias, exactly as in
    one pass.
    """

    time_dim = 2

    def __init__(self, inputs: int, outputs: int, kernel: int, factor: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(inputs, outputs, kernel, stride=factor)
        self.factor = factor
        self.history_shape = (inputs, kernel // factor - 1)
        self._matrix: Tensor | None = None

    def prepare(self) -> None:
        """Lay out the loaded weights for a product, if there will be one."""
        if takes_products(self.conv.weight):
            self._matrix = upsampling_matrix(self.conv.weight, self.factor)

    def forward(self, x: Tensor, states: SlotStates) -> Tensor:
        """See the class. The end of x becomes the history."""
        both = states.extend(self, x)
        if self._matrix is not None and takes_products(x):
            return upsample(both, self._matrix, self.conv.bias)
        y = self.conv(both)
        return y.narrow(2, self.history_shape[1] * self.factor, x.shape[2] * self.factor)


class SnakeBeta(nn.Module):
    """x + sin(x * exp(alpha))^2 / exp(beta) for each channel, in float32. x is [n, channels, time]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def prepare(self) -> None:
        """Compute what depends on the loaded weights alone."""
        self._frequency = self.alpha.float().exp()[:, None]
        self._strength = (self.beta.float().exp() + 1e-9).reciprocal()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, channels, time], any dtype. The result has the same shape and dtype."""
        wave = (x * self._frequency).sin_()
        return torch.addcmul(x, wave * self._strength, wave).to(x.dtype)
