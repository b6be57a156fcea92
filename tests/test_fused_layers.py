"""The fused layers against the plain modules that define them."""

from __future__ import annotations

import pytest
import torch

from qwen_megakernel.model.fused_layers import JoinedLayers, joined_rope
from qwen_megakernel.model.talker import causal_attention, mrope_tables
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config


def attend(layer, q, k, v):
    return causal_attention(q, k.transpose(1, 2), v.transpose(1, 2))


@pytest.mark.parametrize("shape", ["tiny", "tiny-1.7b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_they_compute_the_same(shape, dtype):
    config = shape_config(shape).talker
    talker = random_talker(shape_config(shape), "cpu").to(dtype)
    cos, sin = mrope_tables(config, torch.arange(20).expand(3, -1))
    x = torch.randn(2, 20, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = talker(x, cos[None], sin[None], attend)
    layers = JoinedLayers(talker.model.layers, talker.model.norm.weight, config)
    rope = tuple(table[None] for table in joined_rope(cos, sin, dtype))
    found = layers(x, rope, attend)
    error, scale = (found - expected).float().norm(), expected.float().norm()
    assert error <= (1e-5 if dtype == torch.float32 else 2e-2) * scale
    assert torch.equal(layers(x[1:], rope, attend), found[1:]), "it depends on its company"
    again = talker(x, cos[None], sin[None], attend)
    assert torch.equal(again, expected), "the modules have other weights than before"


def test_nothing_is_in_memory_twice():
    config = shape_config("tiny")
    talker = random_talker(config, "cpu")
    JoinedLayers(talker.model.layers, talker.model.norm.weight, config.talker)
    attention, mlp = talker.model.layers[0].self_attn, talker.model.layers[0].mlp
    for parts in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        assert len({part.weight.untyped_storage().data_ptr() for part in parts}) == 1
