"""Weights in the order and shape in which the frame kernel reads them.

A product W x is cut into items: strips of 16 rows, and parts of k where there are few rows. An item's
bytes are [warp][chunk][lane][8 bf16]. Each of the kernel's 16 warps takes a sixteenth of k in chunks of
16. The 16 bytes of a lane are its mma.m16n8k16 A fragment of the chunk, so the kernel loads weights
without rearranging them. csrc/products.cuh says the same in C++. The weight of a norm is folded into the
product that follows it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qwen_megakernel.model.talker import DecoderLayer, RMSNorm

NUM_WARPS = 16
STRIP_ROWS = 16
CHUNK_K = 16


def split_of(rows: int, k: int) -> int:
    """The number of parts of k: two if the strips of rows alone would leave half of a big GPU idle."""
    return 2 if rows <= 64 * STRIP_ROWS and k >= 1024 else 1


def fragments(weight: Tensor, *, quads: bool = False) -> Tensor:
    """A fragments of every 16 x 16 tile.

    Args:
        weight: [rows, k], both multiples of 16.
        quads: whether a lane's four values of a row are neighbours, as in down. The operand of down
            comes from strips of eight rows, so that four neighbours come from one CTA.

    Returns:
        [rows / 16, k / 16, 256]: lane by lane (g = lane / 4, t = lane % 4) the values of rows g and
        g + 8 at k = 2t, 2t + 1, then the same at k + 8. With `quads`, at 4t, 4t + 1 and 4t + 2, 4t + 3.
    """
    rows, k = weight.shape
    tiles = weight.reshape(rows // STRIP_ROWS, 2, 8, k // CHUNK_K, *((4, 2, 2) if quads else (2, 4, 2)))
    lanes = (2, 4, 5) if quads else (2, 5, 4)
    return tiles.permute(0, 3, *lanes, 1, 6).reshape(rows // STRIP_ROWS, k // CHUNK_K, 256)


def pack_product(weight: Tensor, *, splits: bool = False, quads: bool = False) -> Tensor:
    """One product's items, flat.

    Args:
        weight: bf16 [rows, k].
        splits: whether k may be cut (`split_of`), as the kernel does for O and down.
        quads: see `fragments`.

    Returns:
        bf16 [items * 16 warps * chunks * 256], item = part of k * strips + strip; chunks beyond k are 0.
    """
    rows, k = weight.shape
    parts = split_of(rows, k) if splits else 1
    real = k // parts // CHUNK_K
    chunks = -(-real // NUM_WARPS)
    tiles = fragments(weight, quads=quads).reshape(rows // STRIP_ROWS, parts, real, 256)
    tiles = nn.functional.pad(tiles, (0, 0, 0, chunks * NUM_WARPS - real))
    return tiles.transpose(0, 1).reshape(-1)


def interleave_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Eight rows of gate and eight of up by turns, so that one strip has both halves of a SwiGLU."""
    pairs = torch.stack([gate.reshape(-1, 8, gate.shape[1]), up.reshape(-1, 8, up.shape[1])], dim=1)
    return pairs.reshape(-1, gate.shape[1])


def with_norm(weight: Tensor, norm: RMSNorm) -> Tensor:
    """W diag(gamma), which turns x into W (gamma * x). Each weight is rounded once, to its own type.

    Args:
        weight: [rows, hidden].
        norm: over hidden.
    """
    return (weight.float() * norm.weight.float()).to(weight.dtype)


def _qkv(layer: DecoderLayer) -> Tensor:
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return with_norm(torch.cat([p.weight for p in projections]), layer.input_layernorm)


def pack_layer(layer: DecoderLayer) -> Tensor:
    """A decoder layer's four products, flat bf16: QKV, O, gate-up, down."""
    mlp = layer.mlp
    gate_up = interleave_gate_up(mlp.gate_proj.weight, mlp.up_proj.weight)
    return torch.cat(
        [
            pack_product(_qkv(layer)),
            pack_product(layer.self_attn.o_proj.weight, splits=True),
            pack_product(with_norm(gate_up, layer.post_attention_layernorm)),
            pack_product(mlp.down_proj.weight, splits=True, quads=True),
        ]
    )


def pack_layers(layers: Iterable[DecoderLayer]) -> Tensor:
    """Layers in order, flat bf16."""
    return torch.cat([pack_layer(layer) for layer in layers])


def pack_qk_norms(layers: Iterable[DecoderLayer]) -> Tensor:
    """Weights of the norms over head_dim, bf16 [layers, 2, head_dim]: q, k."""
    return torch.stack(
        [torch.stack([layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight]) for layer in layers]
    )


def known_qkv(layer: DecoderLayer, rows: Tensor) -> Tensor:
    """A layer's queries, keys and values for rows that are known in advance, rounded as in the kernel.

    Args:
        layer: bf16.
        rows: bf16 [..., hidden], before the layer's norm.

    Returns:
        bf16 [..., rows of QKV], before the norms of q and k.
    """
    wide = rows.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + layer.input_layernorm.eps)
    return (wide @ _qkv(layer).float().T * scale).to(torch.bfloat16)


def pack_rope(cos: Tensor, sin: Tensor) -> Tensor:
    """Tables of `rope_tables`, [positions, head_dim], as fp32 [positions, head_dim / 2, 2]."""
    half = cos.shape[-1] // 2
    return torch.stack([cos[:, :half], sin[:, :half]], dim=-1).float().contiguous()
