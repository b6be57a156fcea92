"""Random codec decoders in which every branch affects the sound, without the official package."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from qwen_megakernel.codec.decoder import CodecDecoder, CodecStream
from qwen_megakernel.config import NUM_CODEBOOKS, CodecConfig

TRUE = CodecConfig(
    codebook_size=2048, codebook_dim=512, latent_dim=1024, hidden_size=512, intermediate_size=1024,
    num_layers=8, num_heads=16, num_kv_heads=16, head_dim=64, sliding_window=72, max_positions=8000,
    rope_theta=10_000.0, rms_norm_eps=1e-5, upsample_rates=(8, 5, 4, 3), upsampling_ratios=(2, 2),
    decoder_dim=1536,
)  # fmt: skip
TINY = replace(
    TRUE, codebook_dim=32, latent_dim=48, hidden_size=32, intermediate_size=64, num_layers=2,
    num_heads=4, num_kv_heads=4, head_dim=16, decoder_dim=64,
)  # fmt: skip
ODD = replace(
    TRUE, codebook_dim=20, latent_dim=36, hidden_size=28, intermediate_size=42, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=10, sliding_window=5, decoder_dim=48,
)  # fmt: skip
"""No size is a multiple of 8, queries share keys, and the window is short."""
WIDE = replace(TINY, num_layers=1, decoder_dim=384)
"""Its residual units are 192, 96, 48 and 24 channels wide."""


@functools.cache
def shared_decoder(config: CodecConfig) -> CodecDecoder:
    """`lively_decoder` on the CPU, for tests that leave it as it is."""
    return lively_decoder(config)


@torch.no_grad()
def lively_decoder(config: CodecConfig, device: str = "cpu") -> CodecDecoder:
    """A float32 decoder whose sound is loud (0.3 rms) but rarely clamped."""
    decoder = CodecDecoder(config).to(device)
    rng = torch.Generator(device).manual_seed(0)
    for name, weight in decoder.named_parameters():
        noise = torch.randn(weight.shape, generator=rng, device=device)
        if name.endswith("cluster_usage"):
            weight.uniform_(0.5, 2, generator=rng)
            weight[:100] = 0  # codes that training never used
        elif name.endswith(("scale", "gamma")):
            weight.copy_(0.5 + 0.1 * noise)
        elif name.endswith(("alpha", "beta")):
            weight.copy_(0.3 * noise)
        elif name.endswith("bias"):
            weight.copy_(0.2 * noise)
        elif weight.dim() == 1:  # norms
            weight.copy_(1 + 0.2 * noise)
        elif name.endswith("embedding_sum"):
            weight.copy_(noise)
            weight[:100] *= 1e-5
        else:
            weight.copy_(noise / weight[0].numel() ** 0.5)
        if name.endswith("conv2.conv.weight"):
            # At full strength, twelve snake activations in a row amplify rounding a hundredfold.
            weight.mul_(0.3)
    last = decoder.decoder[-1].conv
    last.bias.zero_()
    last.weight.mul_(1e-3)  # below the clamp, to see how loud it is
    codes = random_codes(8).to(device)
    last.weight.mul_(0.3 / CodecStream(decoder, 1).decode([0], codes).std())
    return decoder


def random_codes(frames: int, seed: int = 0, slots: int = 1) -> Tensor:
    """int64 [slots, frames, 16]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(2048, (slots, frames, NUM_CODEBOOKS), generator=rng)
