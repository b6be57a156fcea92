"""One codec frame as a fixed sequence of kernel launches over tensors.

The plan holds the packed weights, the state of all slots and the buffers between launches. It computes
the same function as `CodecDecoder`, with these changes:

- The two projections around the transformer are merged with the convolutions beside them.
- The launch that writes a row applies the weight of its RMSNorm. The launch that multiplies the row
  applies 1/rms.
- A layer's history is a ring in the slot's state. The ring holds the history and the new frame, and the
  previous layer writes directly into it.

Values between launches are bf16. The transformer's residual, norms, softmax, RoPE, activations and all
sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen_megakernel.codec.cuda_ops import (
    Activation,
    AttentionOp,
    DepthwiseNormOp,
    EmbedOp,
    GemmOp,
    LastConvOp,
    Op,
    Rows,
)
from qwen_megakernel.codec.cuda_packing import (
    PIECE,
    conv_matrix,
    interleave,
    pack_fragments,
    pad_channels,
    pad_heads,
    padded,
    unit_block,
    upsample_matrix,
)
from qwen_megakernel.codec.cuda_tiling import UNIT_CHANNELS, UNIT_TILES, ring_shapes, segments_for
from qwen_megakernel.codec.decoder import (
    CausalConv,
    CodecDecoder,
    ConvNeXtBlock,
    ResidualUnit,
    SnakeBeta,
    rope_table,
)
from qwen_megakernel.config import HOP

__all__ = ["CodecPlan"]


@dataclass(slots=True)
class CodecPlan:
    """The launches of a frame for up to `max_streams` of `num_slots` slots.

    Slot `num_slots` is scratch. Rows of a call that have no stream use it.
    """

    decoder: CodecDecoder
    num_slots: int
    max_streams: int
    ops: list[Op] = field(default_factory=list)
    state: Tensor = field(init=False)
    """bf16 [num_slots + 1, elements]: all rings of each slot. A new slot's are zeros."""
    frame_counts: Tensor = field(init=False)
    """int32 [num_slots + 1]: frames that each slot has decoded."""
    pcm: Tensor = field(init=False)
    """float32 [max_streams, 1920]."""
    _rings: dict[str, Rows] = field(init=False)

    def __post_init__(self) -> None:
        shapes = ring_shapes(self.decoder.config)
        sizes = [frames * rows * channels for frames, rows, channels in shapes.values()]
        self.state = self._zeros(self.num_slots + 1, sum(sizes), dtype=torch.bfloat16)
        self.frame_counts = self._zeros(self.num_slots + 1, dtype=torch.int32)
        self.pcm = self._zeros(self.max_streams, HOP)
        self._rings = {
            name: Rows(part.unflatten(1, (frames * rows, channels)), rows, by_slot=True)
            for (name, (frames, rows, channels)), part in zip(
                shapes.items(), self.state.split(sizes, dim=1), strict=True
            )
        }
        self._build()
        del self.decoder  # the plan no longer needs its tensors

    # ------------------------------------------------------------------ tensors

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        device = self.decoder.pre_conv.conv.weight.device
        return torch.zeros(shape, dtype=dtype, device=device)

    def _scratch(self, rows: int, channels: int, dtype: torch.dtype = torch.bfloat16) -> Rows:
        return Rows(self._zeros(self.max_streams, rows, channels, dtype=dtype), rows)

    @staticmethod
    def _vector(x: Tensor, repeat: int = 1) -> Tensor:
        return pad_channels(x.float(), 0).repeat(repeat).contiguous()

    def _snake(self, snake: SnakeBeta) -> dict[str, Any]:
        snake.prepare()
        return {
            "activation": Activation.SNAKE,
            "act_a": self._vector(snake._frequency[:, 0]),
            "act_b": self._vector(snake._strength[:, 0]),
        }

    def _gemm(self, matrix: Tensor, source: Rows, taps: int = 1, **rest: Any) -> None:
        weights = pack_fragments(matrix)
        segments = segments_for(len(matrix), weights.shape[1], source.rows)
        self.ops.append(GemmOp(weights, source, taps, len(matrix), segments, **rest))

    # ------------------------------------------------------------------ the layers in order

    def _build(self) -> None:
        decoder, config, rings = self.decoder, self.decoder.config, self._rings
        decoder.quantizer.prepare()
        table = pad_channels(decoder.quantizer._table, 1).contiguous()
        self.ops.append(EmbedOp(table, config.codebook_size, rings["codes"]))
        out, squares = self._transformer()
        for i, (upsample, block) in enumerate(decoder.upsample):
            matrix, bias = (
                upsample_matrix(upsample.conv.weight.double(), upsample.factor),
                upsample.conv.bias,
            )
            bias = self._vector(bias, upsample.factor)
            norm = {}
            if i == 0:  # merged with the transformer's last projection
                last = decoder.pre_transformer.output_proj
                bias = bias + (matrix @ pad_channels(last.bias.double(), 0)).float()
                matrix = matrix @ pad_channels(pad_channels(last.weight.double(), 0), 1)
                norm = {
                    "squares_in": squares,
                    "norm_dim": config.hidden_size,
                    "eps": config.rms_norm_eps,
                }
            self._gemm(matrix, out, add=bias, upsample=upsample.factor, out=rings[f"up.{i}"], **norm)
            is_last = i == len(decoder.upsample) - 1
            out = (
                rings["first"]
                if is_last
                else self._scratch(rings[f"up.{i}"].rows, padded(config.latent_dim))
            )
            self._convnext(block, rings[f"up.{i}"], out)
        first, *blocks, act, last = decoder.decoder
        self._conv(first, out, out=rings["block.0"], **self._snake(blocks[0].block[0]))
        for i in range(len(blocks)):
            after = act if i + 1 == len(blocks) else blocks[i + 1].block[0]
            self._upsample_block(i, after, rings["last" if i + 1 == len(blocks) else f"block.{i + 1}"])
        weights = pad_channels(last.conv.weight[0].float().T, 1).contiguous()
        self.ops.append(LastConvOp(rings["last"], weights, float(last.conv.bias), self.pcm))

    def _conv(self, conv: CausalConv, source: Rows, **rest: Any) -> None:
        matrix, layer = conv_matrix(conv.conv.weight), conv.conv
        self._gemm(
            matrix, source, layer.kernel_size[0], dilation=layer.dilation[0],
            add=self._vector(layer.bias), **rest,
        )  # fmt: skip

    def _transformer(self) -> tuple[Rows, Tensor]:
        """Vectors of codes -> the last layer's output times the norm's weight, and its sums of
        squares."""
        config, transformer = self.decoder.config, self.decoder.pre_transformer
        hidden, head_dim = padded(config.hidden_size), 2 * padded(config.head_dim // 2)
        x, row = self._scratch(1, hidden, torch.float32), self._scratch(1, hidden)
        squares = self._zeros(self.max_streams, hidden // PIECE)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        qkv = self._scratch(1, (heads + 2 * kv_heads) * head_dim)
        seen, middle = (
            self._scratch(1, heads * head_dim),
            self._scratch(1, padded(config.intermediate_size)),
        )
        table = rope_table(config, config.sliding_window, x.data.device)
        rope = pad_channels(table, 2).permute(1, 2, 0).contiguous()

        def written(norm: torch.nn.RMSNorm) -> dict[str, Any]:
            """Fields of a launch that adds to the residual and also writes the row that `norm`'s product
            reads."""
            return {
                "raw": x, "out": row, "activation": Activation.NORM_WEIGHT,
                "act_a": self._vector(norm.weight), "squares_out": squares,
            }  # fmt: skip

        normed = {"squares_in": squares, "norm_dim": config.hidden_size, "eps": config.rms_norm_eps}
        pre, into = self.decoder.pre_conv.conv, transformer.input_proj
        projection = pad_channels(pad_channels(into.weight.double(), 0), 1)
        bias = projection @ pad_channels(pre.bias.double(), 0) + pad_channels(into.bias.double(), 0)
        norms = [
            norm
            for layer in transformer.layers
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        norms.append(transformer.norm)
        self._gemm(
            projection @ conv_matrix(pre.weight.double()), self._rings["codes"], pre.kernel_size[0],
            add=bias.float(), **written(norms[0]),
        )  # fmt: skip
        for i, layer in enumerate(transformer.layers):
            attention, mlp = layer.self_attn, layer.mlp
            q = pad_heads(attention.q_proj.weight, heads)
            k, v = (
                pad_heads(attention.k_proj.weight, kv_heads),
                pad_heads(attention.v_proj.weight, kv_heads),
            )
            self._gemm(pad_channels(torch.cat((q, k, v)), 1), row, out=qkv, **normed)
            self.ops.append(
                AttentionOp(
                    qkv, self._rings[f"kv.{i}"], rope, seen, heads, kv_heads, head_dim,
                    config.sliding_window, config.head_dim**-0.5,
                )
            )  # fmt: skip
            o = pad_channels(pad_heads(attention.o_proj.weight.T, heads).T, 0)
            scale = self._vector(layer.self_attn_layer_scale.scale)
            self._gemm(o, seen, mul=scale, residual=x, **written(norms[2 * i + 1]))
            gate_up = interleave(
                pad_channels(mlp.gate_proj.weight, 1), pad_channels(mlp.up_proj.weight, 1)
            )
            self._gemm(gate_up, row, out=middle, activation=Activation.GLU, **normed)
            down = pad_channels(pad_channels(mlp.down_proj.weight, 1), 0)
            scale = self._vector(layer.mlp_layer_scale.scale)
            self._gemm(down, middle, mul=scale, residual=x, **written(norms[2 * i + 2]))
        return row, squares

    def _convnext(self, block: ConvNeXtBlock, source: Rows, out: Rows) -> None:
        channels = source.data.shape[2]
        normed = self._scratch(source.rows, channels)
        conv, norm = block.dwconv.conv, block.norm
        self.ops.append(
            DepthwiseNormOp(
                source, pad_channels(conv.weight[:, 0].float().T, 1).contiguous(),
                self._vector(conv.bias), self._vector(norm.weight), self._vector(norm.bias),
                norm.eps, conv.in_channels, normed,
            )
        )  # fmt: skip
        wide = pad_channels(pad_channels(block.pwconv1.weight, 1), 0)
        middle = self._scratch(source.rows, len(wide))
        bias = self._vector(block.pwconv1.bias)
        self._gemm(wide, normed, add=bias, out=middle, activation=Activation.GELU)
        back, gamma = pad_channels(pad_channels(block.pwconv2.weight, 1), 0), self._vector(block.gamma)
        bias = gamma * self._vector(block.pwconv2.bias)
        self._gemm(back, middle, mul=gamma, add=bias, residual=source, out=out)

    def _upsample_block(self, index: int, act_after: SnakeBeta, out: Rows) -> None:
        _, upsample, *units = self.decoder.decoder[1 + index].block
        rings = [self._rings[f"block.{index}.{unit}"] for unit in range(len(units))]
        rows, channels = rings[0].rows, rings[0].data.shape[2]
        x, middle = self._scratch(rows, channels), None
        if channels not in UNIT_CHANNELS or rows % UNIT_TILES[0]:
            middle = self._scratch(rows, channels)
        factor, weight = upsample.factor, upsample.conv.weight
        self._gemm(
            upsample_matrix(weight, factor), self._rings[f"block.{index}"], weight.shape[2] // factor,
            add=self._vector(upsample.conv.bias, factor), upsample=factor, raw=x, out=rings[0],
            **self._snake(units[0].act1),
        )  # fmt: skip
        for i, unit in enumerate(units):
            if i + 1 < len(units):
                after = {"raw": x, "out": rings[i + 1], **self._snake(units[i + 1].act1)}
            else:
                after = {"out": out, **self._snake(act_after)}
            if middle is None:
                self._unit(unit, rings[i], residual=x, **after)
            else:
                self._conv(unit.conv1, rings[i], out=middle, **self._snake(unit.act2))
                self._conv(unit.conv2, middle, residual=x, **after)

    def _unit(self, unit: ResidualUnit, source: Rows, **after: Any) -> None:
        conv, snake = unit.conv1.conv, self._snake(unit.act2)
        matrix = torch.cat([conv_matrix(layer.conv.weight) for layer in (unit.conv1, unit.conv2)], 1)
        weights = pack_fragments(matrix, len(matrix), unit_block(len(matrix)))
        middle = self._vector(conv.bias), snake["act_a"], snake["act_b"]
        self.ops.append(
            GemmOp(
                weights, source, conv.kernel_size[0], len(matrix), segments=1, dilation=conv.dilation[0],
                add=self._vector(unit.conv2.conv.bias), middle=middle, **after,
            )
        )  # fmt: skip
