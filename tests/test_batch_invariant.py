"""Batch-invariant products give the results of the layers, for one stream alone and among others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen_megakernel.model.batch_invariant import (
    add_by_stream,
    convolve,
    convolve_channels,
    linear_by_stream,
    upsample,
    upsampling_matrix,
)


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("steps", [1, 4, 16, 17, 200])
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (7, 1), (7, 9)])
def test_convolution(steps, taps, dilation):
    x, bias = torch.randn(3, 8, steps + (taps - 1) * dilation), torch.randn(5)
    weight = torch.randn(5, 8, taps)
    together = convolve(x, weight, bias, dilation)
    torch.testing.assert_close(together, F.conv1d(x, weight, bias, dilation=dilation))
    assert torch.equal(together[1:2], convolve(x[1:2], weight, bias, dilation))


def test_convolution_of_a_view():
    x = torch.randn(2, 30, 8).transpose(1, 2)
    weight, bias = torch.randn(5, 8, 7), torch.randn(5)
    torch.testing.assert_close(convolve(x, weight, bias), F.conv1d(x, weight, bias))


def test_convolution_of_single_channels():
    x, weight, bias = torch.randn(3, 8, 10), torch.randn(8, 1, 7), torch.randn(8)
    together = convolve_channels(x, weight, bias)
    torch.testing.assert_close(together, F.conv1d(x, weight, bias, groups=8))
    assert torch.equal(together[1:2], convolve_channels(x[1:2], weight, bias))


@pytest.mark.parametrize("steps", [1, 4, 16, 17, 100])
@pytest.mark.parametrize(("factor", "taps"), [(2, 1), (3, 2), (8, 2), (4, 3)])
def test_transposed_convolution(steps, factor, taps):
    x, bias = torch.randn(3, 8, taps - 1 + steps), torch.randn(5)
    weight = torch.randn(8, 5, taps * factor)
    together = upsample(x, upsampling_matrix(weight, factor), bias)
    whole = F.conv_transpose1d(x, weight, bias, stride=factor)
    expected = whole.narrow(2, (taps - 1) * factor, steps * factor)
    torch.testing.assert_close(together, expected)
    assert torch.equal(together[1:2], upsample(x[1:2], upsampling_matrix(weight, factor), bias))


def test_linear():
    x, weight, bias = torch.randn(7, 2, 96), torch.randn(40, 96), torch.randn(40)
    together = linear_by_stream(x, weight, bias)
    torch.testing.assert_close(together, F.linear(x, weight, bias))
    for i in range(len(x)):
        assert torch.equal(together[i : i + 1], linear_by_stream(x[i : i + 1], weight, bias))


def test_linear_added():
    total, x, weight = torch.randn(7, 2, 40), torch.randn(7, 2, 96), torch.randn(40, 96)
    together = add_by_stream(total, x, weight)
    torch.testing.assert_close(together, total + F.linear(x, weight))
    for i in range(len(x)):
        assert torch.equal(together[i : i + 1], add_by_stream(total[i : i + 1], x[i : i + 1], weight))
