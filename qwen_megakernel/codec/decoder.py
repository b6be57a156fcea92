"""The codec: 16 codes a frame in, 1920 samples a frame out, streaming and exact.

`CodecDecoder` holds the weights under the official names: `decoder.*` of
`speech_tokenizer/model.safetensors`, without the prefix. The reference is `Qwen3TTSTokenizerV2Decoder`
in qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2. `CodecStream` runs the decoder for many
slots at once. Each slot continues where it stopped.

The whole decoder is causal, so each layer needs only the end of its earlier input: a convolution its
receptive field, attention its window of keys and values. These ends and the number of decoded frames are
the whole codec state. A new slot's state is all zeros. A frame that is decoded from the state is the
same as in one pass over all frames. (The official `chunked_decode` differs: its chunks see 25 frames of
context.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_megakernel.codec.interface import CodecState, LaunchedAudio
from qwen_megakernel.codec.layers import CausalConv, CausalUpsample, Recurrent, SlotStates, SnakeBeta
from qwen_megakernel.config import NUM_CODEBOOKS, CodecConfig

__all__ = ["CodecDecoder", "CodecStream"]


_FRAMES_AT_ONCE = 32
"""Frames of a reference that one call decodes. Memory grows with the number."""


class Codebook(nn.Module):
    """One codebook. It is stored as sums over the training vectors of each code, and their counts."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.cluster_usage = nn.Parameter(torch.ones(size))
        self.embedding_sum = nn.Parameter(torch.zeros(size, dim))

    def rows(self) -> Tensor:
        """The vector of every code, float32 [size, dim]."""
        return self.embedding_sum.float() / self.cluster_usage.float().clamp(min=1e-5)[:, None]


class ResidualQuantizer(nn.Module):
    """A group of codebooks that share a projection into the decoder."""

    def __init__(self, config: CodecConfig, num_codebooks: int) -> None:
        super().__init__()
        dim = config.codebook_dim // 2
        # The encoder's half is in the checkpoint, but decoding does not use it.
        self.input_proj = nn.Conv1d(config.codebook_dim, dim, 1, bias=False)
        self.output_proj = nn.Conv1d(dim, config.codebook_dim, 1, bias=False)
        layers = (
            nn.ModuleDict({"_codebook": Codebook(config.codebook_size, dim)})
            for _ in range(num_codebooks)
        )
        self.vq = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def rows(self) -> Tensor:
        """The projected vector of every code, float32 [num_codebooks * codebook_size, codebook_dim]."""
        rows = torch.cat([layer["_codebook"].rows() for layer in self.vq["layers"]])
        return rows @ self.output_proj.weight.float().squeeze(-1).T


class Quantizer(nn.Module):
    """Codes to vectors: one semantic codebook and fifteen acoustic ones, all summed."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.rvq_first = ResidualQuantizer(config, 1)
        self.rvq_rest = ResidualQuantizer(config, NUM_CODEBOOKS - 1)
        self.codebook_size = config.codebook_size

    def prepare(self) -> None:
        """Compute what depends on the loaded weights alone."""
        # A projection of a sum is the sum of projections. So a frame is the sum of 16 rows.
        self._table = torch.cat((self.rvq_first.rows(), self.rvq_rest.rows()))
        self._first_row = torch.arange(NUM_CODEBOOKS, device=self._table.device) * self.codebook_size

    def forward(self, codes: Tensor) -> Tensor:
        """Codes [n, frames, 16] -> float32 [n, frames, codebook_dim]."""
        rows = F.embedding_bag((codes + self._first_row).flatten(0, 1), self._table, mode="sum")
        return rows.unflatten(0, codes.shape[:2])


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # training must not get an inference tensor from the cache
def rope_table(config: CodecConfig, length: int, device: torch.device) -> Tensor:
    """Cosines and sines of the angles at positions 0 .. length-1, float32 [2, length, head_dim/2]."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device) / config.head_dim
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * config.rope_theta**-half
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Apply RoPE to x [n, heads, time, head_dim], in float32. The two halves are the rotated pairs."""
    (cos, sin), (a, b) = rope, x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(Recurrent):
    """Causal attention over the last `sliding_window` frames, which include the present one.

    The history has keys *before* RoPE, and values. Attention depends on distances alone, so positions
    are counted from the start of the history. A stream can have any length, and the angles stay small
    enough to be exact.
    """

    time_dim = 1

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)
        self.history_shape = (config.sliding_window - 1, 2 * kv_dim)

    def forward(self, x: Tensor, states: SlotStates, rope: Tensor, mask: Tensor) -> Tensor:
        frames = x.shape[1]
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = states.extend(self, torch.cat((self.k_proj(x), self.v_proj(x)), -1))
        k, v = kv.unflatten(-1, (2, self.kv_heads, -1)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(
            rotate(q, rope[:, -frames:]),
            rotate(k, rope),
            v,
            attn_mask=mask,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LayerScale(nn.Module):
    """Multiplies what a sublayer adds to the residual by a learnt factor for each channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class TransformerLayer(nn.Module):
    """Attention and MLP, each with a norm before and a LayerScale after."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn_layer_scale = LayerScale(config.hidden_size)
        self.mlp_layer_scale = LayerScale(config.hidden_size)

    def forward(self, x: Tensor, states: SlotStates, rope: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), states, rope, mask))
        return x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    """The transformer at frame rate. Input and output are [n, frames, latent_dim]."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_proj = nn.Linear(config.latent_dim, config.hidden_size)
        self.output_proj = nn.Linear(config.hidden_size, config.latent_dim)

    def forward(self, x: Tensor, states: SlotStates) -> Tensor:
        past, frames = self.config.sliding_window - 1, x.shape[1]
        rope = rope_table(self.config, past + frames, x.device)
        mask = self._mask(states.frame_counts, past, frames)
        x = self.input_proj(x)
        for layer in self.layers:
            x = layer(x, states, rope, mask)
        return self.output_proj(self.norm(x))

    @staticmethod
    def _mask(frame_counts: Tensor, past: int, frames: int) -> Tensor:
        """Which keys each query sees, bool [n, 1, frames, past + frames].

        Query i is at key past + i. It sees that key and the `past` keys before it, except keys from
        before the slot's first frame.
        """
        key = torch.arange(past + frames, device=frame_counts.device)
        query = torch.arange(frames, device=frame_counts.device)[:, None]
        in_window = (key >= query) & (key <= query + past)
        exists = key >= past - frame_counts[:, None, None, None]
        return in_window & exists


class ConvNeXtBlock(nn.Module):
    """Depthwise causal convolution and a pointwise MLP, [n, dim, time]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = CausalConv(dim, dim, kernel=7, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, states: SlotStates) -> Tensor:
        y = self.norm(self.dwconv(x, states).transpose(1, 2))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.transpose(1, 2)


class ResidualUnit(nn.Module):
    """Dilated and pointwise convolution with a shortcut, [n, channels, time]."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.act1 = SnakeBeta(channels)
        self.conv1 = CausalConv(channels, channels, kernel=7, dilation=dilation)
        self.act2 = SnakeBeta(channels)
        self.conv2 = CausalConv(channels, channels, kernel=1)

    def forward(self, x: Tensor, states: SlotStates) -> Tensor:
        y = self.conv1(self.act1(x), states)
        return x + self.conv2(self.act2(y), states)


class UpsampleBlock(nn.Module):
    """[n, inputs, time] -> [n, inputs / 2, time * factor]."""

    def __init__(self, inputs: int, factor: int) -> None:
        super().__init__()
        outputs = inputs // 2
        units = (ResidualUnit(outputs, dilation) for dilation in (1, 3, 9))
        upsample = CausalUpsample(inputs, outputs, kernel=2 * factor, factor=factor)
        self.block = nn.ModuleList((SnakeBeta(inputs), upsample, *units))

    def forward(self, x: Tensor, states: SlotStates) -> Tensor:
        act, upsample, *units = self.block
        x = upsample(act(x), states)
        for unit in units:
            x = unit(x, states)
        return x


class CodecDecoder(nn.Module):
    """The weights and the arithmetic of the codec decoder. It may be built on the meta device."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        latent, width = config.latent_dim, config.decoder_dim
        self.quantizer = Quantizer(config)
        self.pre_conv = CausalConv(config.codebook_dim, latent, kernel=3)
        self.pre_transformer = Transformer(config)
        self.upsample = nn.ModuleList(
            nn.ModuleList((CausalUpsample(latent, latent, factor, factor), ConvNeXtBlock(latent)))
            for factor in config.upsampling_ratios
        )
        blocks = [UpsampleBlock(width >> i, rate) for i, rate in enumerate(config.upsample_rates)]
        last_width = width >> len(blocks)
        self.decoder = nn.ModuleList(
            [
                CausalConv(latent, width, kernel=7),
                *blocks,
                SnakeBeta(last_width),
                CausalConv(last_width, 1, kernel=7),
            ]
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and codec states."""
        return self.pre_conv.conv.weight.dtype

    def prepare(self) -> None:
        """Compute what depends on the weights alone. Call it again if they change or move."""
        for module in self.modules():
            if isinstance(module, (Quantizer, SnakeBeta, CausalUpsample)):
                module.prepare()

    def forward(self, codes: Tensor, states: SlotStates) -> Tensor:
        """Codes [n, frames, 16] -> float32 [n, frames * 1920] in [-1, 1]. Advances `states`."""
        x = self.quantizer(codes).to(self.dtype)
        x = self.pre_conv(x.transpose(1, 2), states)
        x = self.pre_transformer(x.transpose(1, 2), states).transpose(1, 2)
        for upsample, convnext in self.upsample:
            x = convnext(upsample(x, states), states)
        first, *blocks, act, last = self.decoder
        x = first(x, states)
        for block in blocks:
            x = block(x, states)
        return last(act(x), states).squeeze(1).float().clamp(-1, 1)


def check_slots(slots: Sequence[int], num_slots: int) -> None:
    """Raise `ValueError` unless `slots` has at least one slot, no slot repeats, and all are 0 ..
    num_slots - 1."""
    for slot in slots:
        if not 0 <= slot < num_slots:
            raise ValueError(f"slot is {slot}, allowed: 0 to {num_slots - 1}")
    if len(set(slots)) != len(slots) or not slots:
        raise ValueError(f"slots are {list(slots)}, allowed: one or more, each once")


def check_codes(codes: Tensor, num_slots: int, codebook_size: int) -> None:
    """Raise `ValueError` unless `codes` is int64 [num_slots, 1 or more, 16] with codes of the
    codebook."""
    shape, wanted = tuple(codes.shape), f"[{num_slots}, 1 or more, {NUM_CODEBOOKS}]"
    if len(shape) != 3 or shape != (num_slots, shape[1], NUM_CODEBOOKS) or not shape[1]:
        raise ValueError(f"codes have shape {list(shape)}, allowed: {wanted}")
    if codes.dtype != torch.int64:
        raise ValueError(f"codes are {codes.dtype}, allowed: torch.int64")
    low, high = (int(bound) for bound in codes.aminmax())
    if low < 0 or high >= codebook_size:
        raise ValueError(f"codes are from {low} to {high}, allowed: 0 to {codebook_size - 1}")


class CodecStream:
    """Decodes the codes of many slots as they come. Each slot continues where it stopped.

    It works on the device and in the dtype of `decoder`, whose weights must be loaded and must not
    change. In bf16, codebooks, norms, softmax, RoPE and SnakeBeta are computed in float32. In float32 on
    CUDA, convolutions are TF32 unless `torch.backends.cudnn.allow_tf32` is off.
    """

    @torch.no_grad()
    def __init__(self, decoder: CodecDecoder, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}, allowed: at least 1")
        decoder.prepare()
        self.num_slots = num_slots
        self._decoder = decoder
        self._device = decoder.pre_conv.conv.weight.device
        self._layers = [
            m for m in decoder.modules() if isinstance(m, Recurrent) and prod(m.history_shape) > 0
        ]
        self._sizes = [prod(layer.history_shape) for layer in self._layers]
        # One row for each slot holds all its histories, so a reset is one fill.
        self._state = torch.zeros(num_slots, sum(self._sizes), dtype=decoder.dtype, device=self._device)
        self._histories = self._histories_in(self._state)
        self._frame_counts = torch.zeros(num_slots, dtype=torch.int64, device=self._device)

    def _histories_in(self, state: Tensor) -> dict[Recurrent, Tensor]:
        """The histories of all layers, as views of `state`, whose rows are like those of `_state`."""
        return {
            layer: part.unflatten(1, layer.history_shape)
            for layer, part in zip(self._layers, state.split(self._sizes, dim=1), strict=True)
        }

    def reset(self, slot: int) -> None:
        """Reset `slot` to the state of a new one."""
        check_slots([slot], self.num_slots)
        self._state[slot].zero_()
        self._frame_counts[slot] = 0

    @torch.no_grad()
    def state_after(self, codes: Tensor) -> CodecState:
        """See `FrameCodec.state_after`."""
        values, slot = torch.zeros_like(self._state[:1]), torch.zeros(1, dtype=torch.int64)
        slot, frame_counts = slot.to(self._device), torch.zeros_like(self._frame_counts[:1])
        histories = self._histories_in(values)
        for part in self._clamped(codes).split(_FRAMES_AT_ONCE):
            self._decoder(part[None], SlotStates(histories, frame_counts, slot))
            frame_counts += len(part)
        return CodecState(values[0], len(codes))

    def restore(self, slot: int, state: CodecState) -> None:
        """See `FrameCodec.restore`. Raises `ValueError` for a slot out of range."""
        check_slots([slot], self.num_slots)
        self._state[slot].copy_(state.values)
        self._frame_counts[slot] = state.num_frames

    def _clamped(self, codes: Tensor) -> Tensor:
        """`codes` as int64 on the decoder's device, clamped to the codebook."""
        return codes.to(self._device, torch.int64).clamp(0, self._decoder.config.codebook_size - 1)

    @torch.no_grad()
    def decode(self, slots: Sequence[int], codes: Tensor) -> Tensor:
        """Decode the next frames of `slots`, the same number for each.

        A slot's samples depend on its own codes alone, neither on how they are split over calls nor on
        which slots share a call. Memory grows with the number of frames.

        Args:
            slots: n different slots.
            codes: int64 [n, frames, 16], on any device. Their range is checked. If they are not in host
                memory, the check waits for the device.

        Returns:
            float32 [n, frames * 1920] in [-1, 1], on the decoder's device.

        Raises:
            ValueError: a slot or a code is out of range, a slot repeats, or the codes have another
                shape. No slot has changed. After any other error the slots need a reset.
        """
        check_slots(slots, self.num_slots)
        check_codes(codes, len(slots), self._decoder.config.codebook_size)
        slot_ids = torch.tensor(slots, dtype=torch.int64, device=self._device)
        return self._step(slot_ids, codes.to(self._device))

    @torch.no_grad()
    def launch(self, slots: Sequence[int], codes: Tensor) -> LaunchedAudio:
        """See `FrameCodec.launch`. Raises `ValueError` for a slot that is out of range or repeats."""
        check_slots(slots, self.num_slots)
        slot_ids = torch.tensor(slots, dtype=torch.int64, device=self._device)
        pcm = self._step(slot_ids, self._clamped(codes)[:, None])
        return LaunchedAudio(ready=lambda: True, samples=lambda: pcm.cpu().numpy())

    def _step(self, slots: Tensor, codes: Tensor) -> Tensor:
        """`decode` without checks and waits: it makes the same launches for equal shapes."""
        states = SlotStates(self._histories, self._frame_counts, slots)
        pcm = self._decoder(codes, states)
        self._frame_counts.index_add_(0, slots, torch.full_like(slots, codes.shape[1]))
        return pcm
