"""Packed weights against an emulation, lane by lane, of the kernel's tensor-core instruction."""

from __future__ import annotations

import pytest
import torch

from qwen_megakernel.decoding.weight_packing import (
    NUM_WARPS,
    fragments,
    interleave_gate_up,
    known_qkv,
    pack_layer,
    pack_product,
    pack_rope,
    split_of,
    with_norm,
)


def multiply(packed: torch.Tensor, rows: int, k: int, splits: bool, x: torch.Tensor) -> torch.Tensor:
    """W x from packed items, in the order of csrc/gemv.cuh: item, warp, chunk, lane, register."""
    parts = split_of(rows, k) if splits else 1
    strips = rows // 16
    items = packed.reshape(parts, strips, NUM_WARPS, -1, 32, 4, 2)
    chunks = items.shape[3]
    padded = torch.zeros(parts, NUM_WARPS * chunks * 16)
    padded[:, : k // parts] = x.reshape(parts, -1)
    padded = padded.reshape(parts, NUM_WARPS, chunks, 16)
    lane = torch.arange(32)
    group, thread = lane // 4, lane % 4
    y = torch.zeros(rows)
    for register in range(4):  # PTX ISA, mma.m16n8k16: a0a1, a2a3, a4a5, a6a7
        row = group + 8 * (register % 2)
        for half in range(2):
            column = 2 * thread + half + 8 * (register // 2)
            values = items[..., register, half]  # [parts, strips, warps, chunks, lanes]
            products = values * padded[:, None, :, :, column]
            y += torch.zeros(strips, 16).index_add_(1, row, products.sum((0, 2, 3))).reshape(-1)
    return y


@pytest.mark.parametrize(
    ("rows", "k", "splits"),
    [(48, 256, False), (32, 128, False), (64, 192, False), (1024, 1024, True), (128, 2048, True)],
)
def test_a_packed_product_is_the_product(rows, k, splits):
    weight, x = torch.randn(rows, k), torch.randn(k)
    packed = pack_product(weight, splits=splits)
    torch.testing.assert_close(multiply(packed, rows, k, splits, x), weight @ x, rtol=1e-4, atol=1e-3)


def test_every_weight_is_in_the_fragments_once():
    weight = torch.arange(64 * 96, dtype=torch.float32).reshape(64, 96)
    assert torch.equal(fragments(weight).flatten().sort().values, weight.flatten())


def test_gate_and_up_meet_in_one_strip():
    gate, up = torch.arange(32.0)[:, None].expand(32, 16), -torch.arange(32.0)[:, None].expand(32, 16)
    rows = interleave_gate_up(gate, up)[:, 0]
    assert rows[:8].tolist() == gate[:8, 0].tolist()
    assert rows[8:16].tolist() == up[:8, 0].tolist()
    assert rows[16:24].tolist() == gate[8:16, 0].tolist()


def test_a_layer_is_its_products_in_order_of_use():
    from qwen_megakernel.synth.checkpoint import random_talker
    from qwen_megakernel.synth.config import shape_config

    config = shape_config("tiny")
    layer = random_talker(config, "cpu").model.layers[0]
    packed, c = pack_layer(layer), config.talker
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim * c.hidden_size
    padded = qkv * 2  # 8 real chunks of k for 16 warps
    joined = torch.cat([
        layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight
    ])  # fmt: skip
    assert torch.equal(packed[:padded], pack_product(with_norm(joined, layer.input_layernorm)))
    gate_up = interleave_gate_up(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
    after = [
        pack_product(layer.self_attn.o_proj.weight, splits=True),
        pack_product(with_norm(gate_up, layer.post_attention_layernorm)),
        pack_product(layer.mlp.down_proj.weight, splits=True, quads=True),
    ]
    assert torch.equal(packed[padded:], torch.cat(after))


def test_a_norm_s_weight_is_in_the_product_that_follows():
    from qwen_megakernel.model.talker import RMSNorm

    norm = RMSNorm(64, 1e-6)
    norm.weight.data = torch.randn(64).bfloat16() * 8
    weight, x = torch.randn(32, 64).bfloat16(), torch.randn(64)
    product = with_norm(weight, norm)
    assert product.dtype == torch.bfloat16
    exact = weight.float() @ (norm.weight.float() * x)
    assert (product.float() @ x - exact).norm() < 3e-3 * exact.norm()  # one rounding, 2**-9 at most


def test_known_queries_keys_and_values_are_the_layer_s():
    from qwen_megakernel.synth.checkpoint import random_talker
    from qwen_megakernel.synth.config import shape_config

    layer = random_talker(shape_config("tiny"), "cpu").code_predictor.model.layers[0]
    rows = torch.randn(9, layer.self_attn.q_proj.in_features).bfloat16()
    known = known_qkv(layer, rows)
    wide = layer.float()
    normed, attention = wide.input_layernorm(rows.float()), wide.self_attn
    truth = torch.cat(
        [attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)], dim=-1
    )
    assert known.dtype == torch.bfloat16
    assert (known.float() - truth).norm() < 4e-3 * truth.norm()  # bf16 once before and once after


def test_rope_tables_are_pairs():
    cos, sin = torch.rand(5, 64), torch.rand(5, 64)
    table = pack_rope(cos, sin)
    assert table.shape == (5, 32, 2)
    assert torch.equal(table[..., 0], cos[:, :32])
    assert torch.equal(table[..., 1], sin[:, :32])
