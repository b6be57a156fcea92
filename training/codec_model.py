"""What the codec needs for training: an encoder, a quantiser that learns, a decoder with gradients.

The decoder is the product's own (`codec.decoder.CodecDecoder`). Encoder and quantiser belong to the
trainer. They make the codes that the talker learns. Of them, only the codebooks are exported.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_megakernel.codec.decoder import CodecDecoder, Recurrent, SnakeBeta
from qwen_megakernel.config import NUM_CODEBOOKS, CodecConfig
from training.spectra import log_mel

ENCODER_MARGIN = 4
"""The codes of a frame depend on at most this many frames on each side of it."""
_ADOPTED_USAGE = 5.0
"""About how often each code occurs in a batch. It decides how fast adopted codebooks are forgotten."""
_MELS, _N_FFT, _MEL_HOP = 80, 1024, 240


class _Residual(nn.Module):
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(F.gelu(x))))


class MelEncoder(nn.Module):
    """Samples to latents at 12.5 Hz.

    It sees mel magnitudes, not the waveform. So codes hold no phase, which no text could predict.
    """

    def __init__(self, out: int, width: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(_MELS, width, 5, padding=2), _Residual(width, 3)]
        for _ in range(3):  # 100 Hz to 12.5 Hz
            layers += [nn.Conv1d(width, width, 4, stride=2, padding=1), _Residual(width, 3)]
        layers += [_Residual(width, 3), nn.GELU(), nn.Conv1d(width, out, 1)]
        self.layers = nn.Sequential(*layers)
        # This norm keeps every channel in use. Without it the encoder can learn to output always the
        # same.
        self.norm = nn.BatchNorm1d(out, affine=False)

    def forward(self, audio: Tensor) -> Tensor:
        """Audio [n, frames * 1920] to latents [n, frames, out]."""
        mels = log_mel(audio, _N_FFT, _MEL_HOP, _MELS)
        return self.norm(self.layers((mels + 2) / 2).float()).transpose(1, 2)


class LearningCodebook(nn.Module):
    """A codebook that follows the mean of the vectors it quantises. Unused codes move to where data
    is."""

    usage: Tensor
    total: Tensor

    def __init__(self, size: int, dim: int, decay: float = 0.98) -> None:
        super().__init__()
        self.register_buffer("usage", torch.zeros(size))
        self.register_buffer("total", torch.zeros(size, dim))
        self.decay = decay
        self._untouched = True

    def rows(self) -> Tensor:
        """The vector of every code, float32 [size, dim]."""
        return self.total / self.usage.clamp(min=1e-5)[:, None]

    @torch.no_grad()
    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise float32 [n, dim] to codes int64 [n] and their vectors [n, dim]. Learns in train
        mode."""
        if self.training and self._untouched:
            self._untouched = False  # checked once, because the answer is on the device
            if not self.usage.any():
                self.total.copy_(x[torch.randint(len(x), self.usage.shape, device=x.device)])
                self.usage.fill_(1.0)
        rows = self.rows()
        codes = (rows.square().sum(1) - 2 * x @ rows.T).argmin(1)
        if self.training:
            self._learn(x, codes)
        return codes, rows[codes]

    def _learn(self, x: Tensor, codes: Tensor) -> None:
        counts = torch.zeros_like(self.usage).index_add_(0, codes, torch.ones_like(x[:, 0]))
        sums = torch.zeros_like(self.total).index_add_(0, codes, x)
        self.usage.lerp_(counts, 1 - self.decay)
        self.total.lerp_(sums, 1 - self.decay)
        dead = (self.usage < 0.03 * len(x) / len(self.usage))[:, None]
        picks = x[torch.randint(len(x), self.usage.shape, device=x.device)]
        fresh = len(x) / len(self.usage)
        self.total.copy_(torch.where(dead, picks * fresh, self.total))
        self.usage.copy_(torch.where(dead[:, 0], fresh, self.usage))


class LearningQuantizer(nn.Module):
    """Sixteen codebooks in a chain, in the official two groups: the first one, and the other fifteen."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width, dim = config.codebook_dim, config.codebook_dim // 2
        self.inputs = nn.ModuleList(nn.Linear(width, dim, bias=False) for _ in range(2))
        self.outputs = nn.ModuleList(nn.Linear(dim, width, bias=False) for _ in range(2))
        self.books = nn.ModuleList(
            LearningCodebook(config.codebook_size, dim) for _ in range(NUM_CODEBOOKS)
        )

    def bypass(self, latents: Tensor) -> Tensor:
        """Apply only the projections. For the first steps, when quantising the latents is not worthwhile
        yet."""
        first = self.outputs[0](self.inputs[0](latents))
        return first + self.outputs[1](self.inputs[1](latents - first.detach()))

    def forward(self, latents: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise.

        Args:
            latents: float32 [n, frames, codebook_dim].
            kept: int64 [n], the number of codebooks from which each sample is decoded. None keeps all.

        Returns:
            Decoder input [n, frames, codebook_dim] (straight-through), codes int64 [n, frames, 16],
            commitment loss.
        """
        first, codes, loss = self._group(latents, 0, self.books[:1], None)
        rest_latents = latents - first.detach()
        left = None if kept is None else kept - 1
        rest, more, more_loss = self._group(rest_latents, 1, self.books[1:], left)
        return first + rest, torch.cat((codes, more), -1), loss + more_loss

    def _group(
        self, latents: Tensor, group: int, books: nn.ModuleList, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self.inputs[group](latents)
        flat = x.flatten(0, 1)
        residual, total = flat.detach(), torch.zeros_like(flat)
        all_codes, loss = [], flat.new_zeros(())
        for index, book in enumerate(books):
            codes, rows = book.quantise(residual)
            all_codes.append(codes)
            if kept is not None:
                rows = rows * (index < kept).repeat_interleave(x.shape[1])[:, None]
            residual, total = residual - rows, total + rows
            loss = loss + F.mse_loss(flat, total)
        straight = (flat + (total - flat).detach()).view_as(x)
        codes = torch.stack(all_codes, -1).unflatten(0, x.shape[:2])
        return self.outputs[group](straight), codes, loss / len(books)


class FreshStates:
    """The codec states of streams that begin, with gradients. They are zeros before the first frame."""

    def __init__(self, num: int, device: torch.device) -> None:
        self.frame_counts = torch.zeros(num, dtype=torch.int64, device=device)

    def extend(self, layer: Recurrent, new: Tensor) -> Tensor:
        """`new` after the layer's empty history."""
        past = layer.history_shape[layer.time_dim - 1]
        return F.pad(new, (0, 0, past, 0) if layer.time_dim == 1 else (past, 0))


def decode_latents(
    decoder: CodecDecoder, x: Tensor, window: Tensor | None = None, context: int = 0
) -> Tensor:
    """`CodecDecoder.forward` from the quantiser's output on: differentiable, and without clamping.

    Args:
        decoder: its weights may require gradients.
        x: [n, frames, codebook_dim].
        window: int64 [context + w], consecutive frames for the layers above frame rate, which run as if
            their stream began there. None takes all frames. These layers make the samples, which are the
            expensive part.
        context: how many of the window's frames are context only. The slow layers see them, because they
            look far back and are cheap. No samples are made from them.

    Returns:
        float32 [n, (frames or w) * 1920].
    """
    states = FreshStates(len(x), x.device)
    x = decoder.pre_conv(x.transpose(1, 2), states)
    x = decoder.pre_transformer(x.transpose(1, 2), states).transpose(1, 2)
    factor = 1
    for upsample, convnext in decoder.upsample:
        x = convnext(upsample(x, states), states)
        factor *= upsample.factor
    if window is not None:
        steps = window[:, None] * factor + torch.arange(factor, device=x.device)
        x = x.index_select(2, steps.flatten())
    # One frame of context is enough after the first block, and none after the second.
    drops = [max(context - 1, 0), min(context, 1)]
    wide = _fast_layers_on_gpu if x.is_cuda else _fast_layers
    return wide(decoder, x, drops, states)


def _fast_layers(decoder: CodecDecoder, x: Tensor, drops: list[int], states: FreshStates) -> Tensor:
    """Run the layers above frame rate. `drops`: frames of context that end with each block."""
    for module in decoder.modules():
        if isinstance(module, SnakeBeta):
            module.prepare()
    first, *blocks, act, last = decoder.decoder
    x = first(x, states)
    rate = prod(decoder.config.upsampling_ratios)
    for index, block in enumerate(blocks):
        x = block(x, states)
        rate *= decoder.config.upsample_rates[index]
        if index < len(drops):
            x = x[:, :, drops[index] * rate :]
    return last(act(x), states).squeeze(1).float()


def _fast_layers_on_gpu(
    decoder: CodecDecoder, x: Tensor, drops: list[int], states: FreshStates
) -> Tensor:
    """The same with `training.fused`. Streams begin here, so it needs no states."""
    from training import fused  # Triton comes only with a GPU's PyTorch

    first, *blocks, act, last = decoder.decoder
    x = x.transpose(1, 2).to(torch.bfloat16).contiguous()
    x = fused.convolve(x, first.conv.weight, first.conv.bias)
    rate = prod(decoder.config.upsampling_ratios)
    for index, block in enumerate(blocks):
        act_in, up, *units = block.block
        x = fused.snake(x, act_in.alpha, act_in.beta)
        x = fused.upsample(x, up.conv.weight, up.conv.bias, up.factor)
        for unit in units:
            y = fused.snake(x, unit.act1.alpha, unit.act1.beta)
            conv = unit.conv1.conv
            y = fused.convolve(y, conv.weight, conv.bias, conv.dilation[0])
            y = fused.snake(y, unit.act2.alpha, unit.act2.beta)
            x = fused.convolve(y, unit.conv2.conv.weight, unit.conv2.conv.bias, residual=x)
        rate *= decoder.config.upsample_rates[index]
        if index < len(drops) and drops[index]:
            x = x[:, drops[index] * rate :].contiguous()
    x = fused.snake(x, act.alpha, act.beta)
    weight = F.pad(last.conv.weight, (0, 0, 0, 0, 0, 15))  # a tile is sixteen wide
    bias = F.pad(last.conv.bias, (0, 15))
    return fused.convolve(x, weight, bias, dtype=torch.float32)[:, :, 0]


class TrainedCodec(nn.Module):
    """Encoder, quantiser and decoder together."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.encoder = MelEncoder(config.codebook_dim)
        self.quantizer = LearningQuantizer(config)
        self.decoder = CodecDecoder(config)

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Codes int64 [n, frames, 16] of audio float32 [n, frames * 1920]."""
        return self.quantizer(self.encoder(audio))[1]

    @torch.no_grad()
    def adopt(self) -> None:
        """Take codebooks and projections from the decoder. The opposite of `publish`."""
        groups = (self.decoder.quantizer.rvq_first, self.decoder.quantizer.rvq_rest)
        books = list(self.quantizer.books)
        for index, (group, mine) in enumerate(zip(groups, (books[:1], books[1:]), strict=True)):
            self.quantizer.inputs[index].weight.copy_(group.input_proj.weight[..., 0])
            self.quantizer.outputs[index].weight.copy_(group.output_proj.weight[..., 0])
            for layer, book in zip(group.vq["layers"], mine, strict=True):
                rows = layer["_codebook"]
                means = rows.embedding_sum / rows.cluster_usage.clamp(min=1e-5)[:, None]
                book.usage.fill_(_ADOPTED_USAGE)
                book.total.copy_(means * _ADOPTED_USAGE)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the learnt codebooks and projections into the decoder."""
        groups = (self.decoder.quantizer.rvq_first, self.decoder.quantizer.rvq_rest)
        books = list(self.quantizer.books)
        for index, (group, mine) in enumerate(zip(groups, (books[:1], books[1:]), strict=True)):
            group.input_proj.weight.copy_(self.quantizer.inputs[index].weight[..., None])
            group.output_proj.weight.copy_(self.quantizer.outputs[index].weight[..., None])
            for layer, book in zip(group.vq["layers"], mine, strict=True):
                layer["_codebook"].embedding_sum.copy_(book.rows())
                layer["_codebook"].cluster_usage.fill_(1.0)
