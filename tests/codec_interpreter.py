"""Run a codec plan op by op in PyTorch: the result that the kernels of csrc/codec_*.cu must have.

It is slow and literal. It reads the packed weights, the rings and the segments as the kernels do, so
that packing, layout and plan can be tested without a GPU.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
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
from qwen_megakernel.codec.cuda_plan import CodecPlan


def unpack_fragments(packed: Tensor) -> Tensor:
    """Undo `pack_fragments`: the mma A operand, element by element."""
    tall, wide, strips, steps = packed.shape[:4]
    matrix = torch.empty(tall * strips * 16, wide * steps * 16, dtype=packed.dtype)
    tiles = packed.permute(0, 2, 1, 3, 4, 5).flatten(2, 3).flatten(0, 1)  # [m / 16, k / 16, 32, 8]
    for lane in range(32):
        for register in range(4):
            row = lane // 4 + 8 * (register % 2)
            column = lane % 4 * 2 + 8 * (register // 2)
            for half in range(2):
                matrix[row::16, column + half :: 16] = tiles[:, :, lane, 2 * register + half]
    return matrix


class Interpreter:
    """Runs frames of a plan on the CPU."""

    def __init__(self, plan: CodecPlan) -> None:
        self.plan = plan
        self.matrices = {
            id(op): unpack_fragments(op.weights).float() for op in plan.ops if isinstance(op, GemmOp)
        }

    def step(self, slots: list[int], codes: Tensor) -> Tensor:
        """One frame: codes [n, 16] -> samples [n, 1920]."""
        self.begin(slots, codes)
        for op in self.plan.ops:
            self.run(op)
        return self.plan.pcm[: len(slots)].clone()

    def begin(self, slots: list[int], codes: Tensor) -> None:
        self.slots, self.codes = slots, codes
        self.call_frame_counts = [int(self.plan.frame_counts[slot]) for slot in slots]

    def run(self, op: Op) -> None:
        getattr(self, type(op).__name__)(op)

    def where(self, rows: Rows, stream: int) -> tuple[Tensor, int]:
        """The stream's rows [frames * rows, channels], and the row where this frame begins."""
        if not rows.by_slot:
            return rows.data[stream], 0
        frames = rows.data.shape[1] // rows.rows
        return rows.data[self.slots[stream]], self.call_frame_counts[stream] % frames * rows.rows

    def read(self, rows: Rows, stream: int, history: int = 0) -> Tensor:
        """A stream's rows of this frame and before: float32 [history + rows, channels]."""
        data, first = self.where(rows, stream)
        at = torch.arange(first - history, first + rows.rows) % len(data)
        return data[at].float()

    def write(self, rows: Rows | None, stream: int, values: Tensor) -> None:
        if rows is not None:
            data, first = self.where(rows, stream)
            data[first : first + rows.rows] = values.to(data.dtype)

    def EmbedOp(self, op: EmbedOp) -> None:
        for stream, slot in enumerate(self.slots):
            rows = torch.arange(16) * op.codebook_size + self.codes[stream]
            self.write(op.out, stream, op.table[rows].sum(0, keepdim=True))
            self.plan.frame_counts[slot] += 1

    def GemmOp(self, op: GemmOp) -> None:
        matrix = self.matrices[id(op)][: op.m]
        for stream in range(len(self.slots)):
            x = self.read(op.source, stream, op.history)
            columns = torch.cat(
                [x[tap * op.dilation :][: op.source.rows] for tap in range(op.taps)], dim=1
            )
            if op.middle:
                columns, used = (
                    self.middle(op, columns @ matrix[:, : columns.shape[1]].T),
                    columns.shape[1],
                )
                self.finish(op, stream, columns @ matrix[:, used:].T)
                continue
            columns = F.pad(columns, (0, matrix.shape[1] - columns.shape[1]))
            bounds = [part * op.k_blocks // op.segments * 64 for part in range(op.segments + 1)]
            y = sum(columns[:, a:b] @ matrix[:, a:b].T for a, b in itertools.pairwise(bounds))
            self.finish(op, stream, y)

    @staticmethod
    def middle(op: GemmOp, y: Tensor) -> Tensor:
        add, frequency, strength = op.middle
        y = y + add
        return (y + strength * (y * frequency).sin().square()).bfloat16().float()

    def finish(self, op: GemmOp, stream: int, y: Tensor) -> None:
        """Store the result of an op. y: [columns of the stream, m]."""
        if op.mul is not None:
            y = y * op.mul
        if op.squares_in is not None:
            y = y * (op.squares_in[stream].sum() / op.norm_dim + op.eps).rsqrt()
        if op.add is not None:
            y = y + op.add
        if op.activation == Activation.GLU:
            self.write(op.out, stream, F.silu(y[:, ::2]) * y[:, 1::2])
            return
        y = y.reshape(op.source.rows * op.upsample, -1)
        if op.residual is not None:
            y = y + self.read(op.residual, stream)
        self.write(op.raw, stream, y)
        if op.squares_out is not None:
            op.squares_out[stream] = y.square().unflatten(1, (-1, 8)).sum((0, 2))
        if op.activation == Activation.SNAKE:
            y = y + op.act_b * (y * op.act_a).sin().square()
        elif op.activation == Activation.GELU:
            y = F.gelu(y)
        elif op.activation == Activation.NORM_WEIGHT:
            y = y * op.act_a
        self.write(op.out, stream, y)

    def AttentionOp(self, op: AttentionOp) -> None:
        q_dim, kv_dim, half = op.heads * op.head_dim, op.kv_heads * op.head_dim, op.head_dim // 2
        for stream in range(len(self.slots)):
            q, kv = self.read(op.qkv, stream)[0].split((q_dim, 2 * kv_dim))
            self.write(op.kv, stream, kv[None])
            lived = min(self.call_frame_counts[stream] + 1, op.window)
            newest_first = self.read(op.kv, stream, op.window - 1).flip(0)[:lived]
            keys, values = newest_first.unflatten(1, (2, op.kv_heads, op.head_dim)).unbind(1)
            cos, sin = op.rope[:lived, None].unbind(-1)
            a, b = keys[..., :half], keys[..., half:]
            keys = torch.cat((a * cos + b * sin, b * cos - a * sin), -1)
            group = op.heads // op.kv_heads
            q = q.unflatten(0, (op.heads, -1))
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
            weights = (torch.einsum("hd,khd->hk", q, keys) * op.scale).softmax(-1)
            self.write(op.out, stream, torch.einsum("hk,khd->hd", weights, values).reshape(1, -1))

    def DepthwiseNormOp(self, op: DepthwiseNormOp) -> None:
        taps, n = len(op.weights), op.real_channels
        for stream in range(len(self.slots)):
            x = self.read(op.source, stream, taps - 1)
            y = op.bias + sum(x[tap:][: op.source.rows] * op.weights[tap] for tap in range(taps))
            normed = F.layer_norm(y[:, :n], (n,), op.norm_weight[:n], op.norm_bias[:n], op.eps)
            self.write(op.out, stream, F.pad(normed, (0, y.shape[1] - n)))

    def LastConvOp(self, op: LastConvOp) -> None:
        taps = len(op.weights)
        for stream in range(len(self.slots)):
            x = self.read(op.source, stream, taps - 1)
            y = sum(x[tap:][: op.source.rows] @ op.weights[tap] for tap in range(taps))
            op.pcm[stream] = (y + op.bias).clamp(-1, 1)
