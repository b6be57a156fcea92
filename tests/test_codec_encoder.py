"""The codec encoder against the official one, with random weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_speaker_encoder import speech_like

from qwen_megakernel.codec.encoder import CodecEncoder
from qwen_megakernel.config import ConfigError

MIMI = {
    "hidden_size": 32, "num_filters": 4, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16, "num_quantizers": 18, "upsample_groups": 32,
    "rope_theta": 10000.0, "max_position_embeddings": 8000, "sliding_window": 4,
}  # fmt: skip


def official_encoder(config: dict, *, full_attention: bool = True, seed: int = 0) -> torch.nn.Module:
    """The official encoder with random weights that make codes vary and attention matter."""
    import official

    official.prepare()
    from qwen_tts._transformers_compat import restore_mimi_full_attention
    from transformers import MimiConfig

    torch.manual_seed(seed)
    encoder = official.codec.Qwen3TTSTokenizerV2Encoder._from_config(MimiConfig(**config)).eval()
    with torch.no_grad():
        for name, value in encoder.state_dict().items():
            if name.endswith("embed_sum"):
                value.normal_()
            elif name.endswith("cluster_usage"):
                value.uniform_(0.5, 3.0)
            elif name.endswith("layer_scale.scale"):
                value.normal_(0.5, 0.1)
            elif "encoder_transformer" in name and value.dim() == 2:
                value.normal_(0.0, 2.0 / value.shape[1] ** 0.5)
            elif value.dim() == 3:
                value.normal_(0.0, 1.4 / (value.shape[1] * value.shape[2]) ** 0.5)
            elif name.endswith("conv.bias"):
                value.mul_(0.1)
    if full_attention:
        restore_mimi_full_attention(encoder)
    return encoder


def official_codes(encoder: torch.nn.Module, audio: torch.Tensor) -> torch.Tensor:
    """`Qwen3TTSTokenizerV2Model.encode` itself, on a stand-in that has only the encoder."""
    import official

    model = SimpleNamespace(
        encoder=encoder, encoder_valid_num_quantizers=16, encode_downsample_rate=1920,
        config=SimpleNamespace(return_dict=True),
    )  # fmt: skip
    mask = torch.ones(1, len(audio), dtype=torch.int64)
    with torch.inference_mode():
        return official.codec.Qwen3TTSTokenizerV2Model.encode(model, audio[None], mask).audio_codes[0]


def from_meta(config: dict, state: dict) -> CodecEncoder:
    with torch.device("meta"):
        encoder = CodecEncoder(config)
    encoder.load_state_dict(state, strict=True, assign=True)
    assert not any(t.is_meta for t in (*encoder.parameters(), *encoder.buffers()))
    return encoder


def check_parity(config: dict, lengths: list[int]) -> None:
    theirs = official_encoder(config)
    ours = from_meta(config, theirs.state_dict())
    for samples in lengths:
        audio = speech_like(samples, seed=samples)
        expected, codes = official_codes(theirs, audio), ours.encode(audio)
        assert codes.shape == (-(-samples // 1920), 16)
        assert codes.dtype == torch.int64
        assert torch.equal(codes, expected), (
            f"{samples} samples: {(codes != expected).sum()} codes differ"
        )
        if samples > 20_000:
            assert min(codes[:, g].unique().numel() for g in range(16)) > 3, "weights too dull to tell"


def test_codes_equal_official():
    check_parity(MIMI, [1, 500, 1919, 1920, 1921, 24_000, 43_210])


@pytest.mark.parametrize(
    "change",
    [
        {"num_residual_layers": 2, "dilation_growth_rate": 3, "compress": 4},
        {"num_quantizers": 16, "num_semantic_quantizers": 2},
        {"vector_quantization_hidden_dimension": 32, "codebook_dim": 32},
        {
            "upsampling_ratios": [4, 5, 6, 8],
            "kernel_size": 5,
            "last_kernel_size": 5,
            "residual_kernel_size": 5,
        },
        {"rope_theta": 100.0, "norm_eps": 1e-2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_codes_equal_official_in_other_shapes(change):
    check_parity(MIMI | change, [24_001])


def test_rope_theta_where_transformers_5_writes_it():
    theirs = official_encoder(MIMI | {"rope_theta": 100.0})
    config = {k: v for k, v in MIMI.items() if k != "rope_theta"}
    audio = speech_like(48_000)
    nested = from_meta(config | {"rope_parameters": {"rope_theta": 100.0}}, theirs.state_dict())
    assert torch.equal(nested.encode(audio), official_codes(theirs, audio))
    assert not torch.equal(from_meta(config, theirs.state_dict()).encode(audio), nested.encode(audio))


def test_attention_is_full_and_that_matters():
    """The window of the configuration changes the codes; the released model is run without it."""
    windowed = official_encoder(MIMI, full_attention=False)
    audio = speech_like(48_000)
    ours = from_meta(MIMI, windowed.state_dict()).encode(audio)
    assert not torch.equal(ours, official_codes(windowed, audio))
    assert torch.equal(ours, official_codes(official_encoder(MIMI), audio))


@pytest.mark.slow
def test_codes_equal_official_at_the_true_shape():
    check_parity({"rope_theta": 10000.0}, [40_001])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"upsampling_ratios": [8, 6, 5, 5]}, "expected a product of 960"),
        ({"num_quantizers": 8}, "num_quantizers is 8"),
        ({"codebook_size": 1024}, "codebook_size is 1024, expected 2048"),
        ({"use_causal_conv": False}, "use_causal_conv is False"),
        ({"pad_mode": "reflect"}, "pad_mode is 'reflect'"),
    ],
)
def test_unsupported_codec_is_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        CodecEncoder(MIMI | change)
