"""The codec's encoder: samples of a reference recording to codes, 16 a frame.

It is the analysis half of Mimi (https://arxiv.org/abs/2410.00037): SEANet convolutions to 25 Hz, a
causal transformer, one more convolution to 12.5 Hz, residual vector quantization. It runs once for each
voice, in float32.
"""

# Why this is not transformers' MimiModel: its releases up to 5.17 read the released file, but 5.18
# renames the tensors. Its RoPE buffers are not in the file, so a model on the meta device stays
# incomplete. Since 5.0 it applies the `sliding_window` of `encoder_config`; 4.57, which the official
# code uses, ignores it. The official package, once imported, changes the table from which MimiModel
# makes its RoPE.

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_megakernel.config import (
    HOP,
    NUM_CODEBOOKS,
    SAMPLE_RATE,
    ConfigError,
    get_count,
    get_counts,
    get_positive,
)

CODEBOOK_SIZE = 2048


@dataclass(frozen=True, slots=True)
class MimiShape:
    """The shapes in `encoder_config`. Defaults are those of the official class (MimiConfig)."""

    num_filters: int = 64
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 6, 5, 4)
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    compress: int = 2
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    num_quantizers: int = 32
    num_semantic_quantizers: int = 1
    vector_quantization_hidden_dimension: int = 256

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> MimiShape:
        """Read `encoder_config`. Raises `ConfigError` for values that no released codec has."""
        fixed = {
            "audio_channels": 1, "attention_bias": False, "codebook_size": CODEBOOK_SIZE,
            "hidden_act": "gelu", "pad_mode": "constant", "sampling_rate": SAMPLE_RATE,
            "use_causal_conv": True, "use_conv_shortcut": False,
        }  # fmt: skip
        for key, expected in fixed.items():
            if section.get(key, expected) != expected:
                raise ConfigError(f"encoder_config: {key} is {section[key]!r}, expected {expected!r}")
        rope = section.get("rope_parameters")  # transformers 5 writes it there
        given = dict(rope) if isinstance(rope, dict) else {}
        given |= {name: value for name, value in section.items() if value is not None}
        read = {int: get_count, tuple: get_counts, float: get_positive}
        known: dict[str, Any] = {
            f.name: read[type(f.default)](given, f.name, "encoder_config")
            for f in fields(cls)
            if f.name in given
        }
        shape = cls(**known)
        if section.get("head_dim") is None:
            shape = cls(**known | {"head_dim": shape.hidden_size // shape.num_attention_heads})
        if prod(shape.upsampling_ratios) * 2 != HOP:
            raise ConfigError(
                f"encoder_config: upsampling_ratios {list(shape.upsampling_ratios)}, "
                f"expected a product of {HOP // 2}"
            )
        if not shape.num_semantic_quantizers < NUM_CODEBOOKS <= shape.num_quantizers:
            raise ConfigError(
                f"encoder_config: num_quantizers is {shape.num_quantizers}, "
                f"expected {NUM_CODEBOOKS} or more"
            )
        return shape


class _CausalConv(nn.Module):
    """Convolution that sees no later sample. The output has ceil(length / stride) positions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        bias: bool = True,
        pad_mode: str = "constant",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            in_channels, out_channels, kernel_size, stride, dilation=dilation, bias=bias
        )
        self._stride, self._pad_mode = stride, pad_mode
        self._left = (kernel_size - 1) * dilation + 1 - stride

    def forward(self, x: Tensor) -> Tensor:
        right = -x.shape[-1] % self._stride
        return self.conv(F.pad(x, (self._left, right), mode=self._pad_mode))


class _ResidualUnit(nn.Module):
    def __init__(self, shape: MimiShape, channels: int, dilation: int) -> None:
        super().__init__()
        hidden = channels // shape.compress
        self.block = nn.Sequential(
            nn.ELU(),
            _CausalConv(channels, hidden, shape.residual_kernel_size, dilation=dilation),
            nn.ELU(),
            _CausalConv(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class _SEANet(nn.Module):
    """`[1, 1, samples]` to `[1, hidden, ceil(samples / 960)]`."""

    def __init__(self, shape: MimiShape) -> None:
        super().__init__()
        channels = shape.num_filters
        layers: list[nn.Module] = [_CausalConv(1, channels, shape.kernel_size)]
        for ratio in reversed(shape.upsampling_ratios):  # the list is in the decoder's order
            layers += [
                _ResidualUnit(shape, channels, shape.dilation_growth_rate**depth)
                for depth in range(shape.num_residual_layers)
            ]
            layers += [nn.ELU(), _CausalConv(channels, 2 * channels, 2 * ratio, ratio)]
            channels *= 2
        layers += [nn.ELU(), _CausalConv(channels, shape.hidden_size, shape.last_kernel_size)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Attention(nn.Module):
    """Attention over all earlier frames, with rotary positions."""

    def __init__(self, shape: MimiShape) -> None:
        super().__init__()
        self._shape = shape
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def _rotate(self, x: Tensor) -> Tensor:
        frames, half = x.shape[2], self._shape.head_dim // 2
        exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
        positions = torch.arange(frames, device=x.device, dtype=torch.float32)
        angles = positions[:, None] * self._shape.rope_theta**-exponents
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (p.unflatten(2, (-1, self._shape.head_dim)).transpose(1, 2) for p in projections)
        y = F.scaled_dot_product_attention(
            self._rotate(q),
            self._rotate(k),
            v,
            is_causal=True,
            enable_gqa=self._shape.num_attention_heads != self._shape.num_key_value_heads,
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, shape: MimiShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class _TransformerLayer(nn.Module):
    def __init__(self, shape: MimiShape) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(shape.hidden_size, eps=shape.norm_eps)
        self.self_attn = _Attention(shape)
        self.self_attn_layer_scale = _Scale(shape.hidden_size)
        self.post_attention_layernorm = nn.LayerNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = _MLP(shape)
        self.mlp_layer_scale = _Scale(shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x)))
        return x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))


class _Transformer(nn.Module):
    """`[1, hidden, positions]` to the same shape. There is no final norm."""

    def __init__(self, shape: MimiShape) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_TransformerLayer(shape) for _ in range(shape.num_hidden_layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(1, 2)).transpose(1, 2)


class _Codebook(nn.Module):
    """The entries as training stores them: a running sum of vectors, and their count."""

    cluster_usage: Tensor
    embed_sum: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("initialized", torch.ones(1))
        self.register_buffer("cluster_usage", torch.ones(CODEBOOK_SIZE))
        self.register_buffer("embed_sum", torch.zeros(CODEBOOK_SIZE, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest entry to each row of `[frames, width]`: its index and its vector."""
        entries = self.embed_sum / self.cluster_usage.clamp(min=1e-5)[:, None]
        codes = torch.cdist(x[None], entries[None])[0].argmin(dim=-1)
        return codes, entries[codes]


class _Quantizer(nn.Module):
    """A chain of codebooks. Each quantises what the earlier ones left over."""

    def __init__(self, shape: MimiShape, num_codebooks: int) -> None:
        super().__init__()
        width = shape.vector_quantization_hidden_dimension
        if width != shape.hidden_size:
            self.input_proj = nn.Conv1d(shape.hidden_size, width, 1, bias=False)
            self.output_proj = nn.Conv1d(width, shape.hidden_size, 1, bias=False)  # decoding only
        else:
            self.input_proj = nn.Identity()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"codebook": _Codebook(width)}) for _ in range(num_codebooks)
        )

    def forward(self, x: Tensor, num_codebooks: int) -> Tensor:
        """`[1, hidden, frames]` to codes `[frames, num_codebooks]`."""
        residual = self.input_proj(x)[0].T
        codes = []
        for layer in self.layers[:num_codebooks]:
            indices, entries = layer["codebook"](residual)
            residual = residual - entries
            codes.append(indices)
        return torch.stack(codes, dim=1)


class CodecEncoder(nn.Module):
    """Audio to codes. Parameter names are those of `speech_tokenizer/model.safetensors` without
    `encoder.`.

    An instance on the meta device is complete after `load_state_dict(assign=True)`: the file has every
    buffer.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Build it from `ModelConfig.codec_encoder`. Raises `ConfigError` for values that no released
        codec has."""
        super().__init__()
        shape = MimiShape.from_dict(config)
        width, semantic = shape.hidden_size, shape.num_semantic_quantizers
        self._num_semantic = semantic
        self.encoder = _SEANet(shape)
        self.encoder_transformer = _Transformer(shape)
        self.downsample = _CausalConv(width, width, 4, 2, bias=False, pad_mode="replicate")
        self.quantizer = nn.ModuleDict(
            {
                "semantic_residual_vector_quantizer": _Quantizer(shape, semantic),
                "acoustic_residual_vector_quantizer": _Quantizer(shape, shape.num_quantizers - semantic),
            }
        )

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Encode audio into the 16 codes of each 80 ms.

        Args:
            audio: `[samples]`, mono, 24 kHz, on any device; at least one sample.

        Returns:
            `[ceil(samples / 1920), 16]` int64, each 0 .. 2047, on the device of the weights.
        """
        weight = self.downsample.conv.weight
        x = self.encoder(audio.to(weight.device, weight.dtype)[None, None])
        latents = self.downsample(self.encoder_transformer(x))
        semantic, acoustic = self.quantizer.values()
        return torch.cat(
            (
                semantic(latents, self._num_semantic),
                # The file has more codebooks than the talker uses.
                acoustic(latents, NUM_CODEBOOKS - self._num_semantic),
            ),
            dim=1,
        )
