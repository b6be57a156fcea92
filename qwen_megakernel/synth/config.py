"""The JSON files of a random checkpoint. Their contents are the released ones', at a true or a tiny
size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from qwen_megakernel.config import HOP, NUM_CODEBOOKS, SAMPLE_RATE, ModelConfig, VoiceMode
from qwen_megakernel.synth.tokenizer import special_ids

Shape = Literal["tiny", "tiny-1.7b", "0.6b", "1.7b"]
"""`tiny-1.7b` is tiny with a talker that is wider than its predictor, as in 1.7B."""
SHAPES: tuple[Shape, ...] = get_args(Shape)


@dataclass(frozen=True, slots=True)
class _Geometry:
    """The values in which the shapes differ. All others are common to all released checkpoints."""

    size: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mrope: tuple[int, int, int]
    text_hidden: int
    text_vocab: int
    predictor_hidden: int
    predictor_intermediate: int
    predictor_layers: int
    tiny: bool


_TINY = _Geometry("0b6", 128, 256, 2, 4, 2, 64, (12, 10, 10), 64, 1024, 128, 256, 2, True)
_TRUE = _Geometry("0b6", 1024, 3072, 28, 16, 8, 128, (24, 20, 20), 2048, 151936, 1024, 3072, 5, False)
_GEOMETRY: dict[Shape, _Geometry] = {
    "tiny": _TINY,
    "tiny-1.7b": replace(_TINY, size="1b7", hidden=192),
    "0.6b": _TRUE,
    "1.7b": replace(_TRUE, size="1b7", hidden=2048, intermediate=6144),
}

_LANGUAGES = {
    "chinese": 2055, "english": 2050, "german": 2053, "italian": 2070, "portuguese": 2071,
    "spanish": 2054, "japanese": 2058, "korean": 2064, "french": 2061, "russian": 2069,
}  # fmt: skip
_DIALECTS = {"beijing_dialect": 2074, "sichuan_dialect": 2062}
_SPEAKERS = {
    "serena": 3066, "vivian": 3065, "uncle_fu": 3010, "ryan": 3061, "aiden": 2861,
    "ono_anna": 2873, "sohee": 2864, "eric": 2875, "dylan": 2878,
}  # fmt: skip
_SPEAKER_DIALECTS = {"dylan": "beijing_dialect", "eric": "sichuan_dialect"}


def _decoder_stack(geo: _Geometry, hidden: int, intermediate: int, layers: int) -> dict[str, Any]:
    return {
        "attention_bias": False, "attention_dropout": 0, "head_dim": geo.head_dim, "hidden_act": "silu",
        "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": intermediate,
        "num_attention_heads": geo.heads, "num_hidden_layers": layers,
        "num_key_value_heads": geo.kv_heads, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000,
        "sliding_window": None, "use_cache": True, "use_sliding_window": False,
    }  # fmt: skip


def _predictor_config(geo: _Geometry) -> dict[str, Any]:
    layers = geo.predictor_layers
    return {
        **_decoder_stack(geo, geo.predictor_hidden, geo.predictor_intermediate, layers),
        "layer_types": ["full_attention"] * layers, "max_position_embeddings": 65536,
        "max_window_layers": 28, "model_type": "qwen3_tts_talker_code_predictor",
        "num_code_groups": NUM_CODEBOOKS, "rope_scaling": None, "vocab_size": 2048,
    }  # fmt: skip


def _talker_config(geo: _Geometry, mode: VoiceMode) -> dict[str, Any]:
    custom = mode == "custom_voice"
    return {
        **_decoder_stack(geo, geo.hidden, geo.intermediate, geo.layers),
        "code_predictor_config": _predictor_config(geo),
        "codec_bos_id": 2149, "codec_eos_token_id": 2150,
        "codec_language_id": {**_LANGUAGES, **(_DIALECTS if custom else {})},
        "codec_nothink_id": 2155, "codec_pad_id": 2148, "codec_think_bos_id": 2156,
        "codec_think_eos_id": 2157, "codec_think_id": 2154, "max_position_embeddings": 32768,
        "model_type": "qwen3_tts_talker", "num_code_groups": NUM_CODEBOOKS,
        "position_id_per_seconds": 13,
        "rope_scaling": {
            "interleaved": True, "mrope_section": list(geo.mrope),
            "rope_type": "default", "type": "default",
        },
        "spk_id": dict(_SPEAKERS) if custom else {},
        "spk_is_dialect": {n: _SPEAKER_DIALECTS.get(n, False) for n in _SPEAKERS} if custom else {},
        "text_hidden_size": geo.text_hidden, "text_vocab_size": geo.text_vocab, "vocab_size": 3072,
    }  # fmt: skip


def _speaker_config(geo: _Geometry) -> dict[str, Any]:
    config: dict[str, Any] = {"enc_dim": geo.hidden, "sample_rate": SAMPLE_RATE}
    if geo.tiny:  # the released files leave these to the defaults of the official class
        config.update(
            enc_channels=[32, 32, 32, 32, 96], enc_attention_channels=16, enc_se_channels=16,
            enc_kernel_sizes=[5, 3, 3, 3, 1], enc_dilations=[1, 2, 3, 4, 1], enc_res2net_scale=8,
            mel_dim=128,
        )  # fmt: skip
    return config


def root_config(shape: Shape, mode: VoiceMode) -> dict[str, Any]:
    """The content of `config.json`."""
    geo = _GEOMETRY[shape]
    ids = special_ids(geo.tiny)
    config = {
        "architectures": ["Qwen3TTSForConditionalGeneration"],
        "im_end_token_id": ids["<|im_end|>"],
        "im_start_token_id": ids["<|im_start|>"],
        "model_type": "qwen3_tts",
        "talker_config": _talker_config(geo, mode),
        "tokenizer_type": "qwen3_tts_tokenizer_12hz",
        "torch_dtype": "bfloat16",
        "tts_bos_token_id": ids["<tts_text_bos>"],
        "tts_eos_token_id": ids["<tts_text_eod>"],
        "tts_model_size": geo.size,
        "tts_model_type": mode,
        "tts_pad_token_id": ids["<tts_pad>"],
    }
    if mode == "base":
        config["speaker_encoder_config"] = _speaker_config(geo)
    return config


def _codec_encoder_config(tiny: bool) -> dict[str, Any]:
    size = {
        "codebook_dim": 16, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_filters": 4,
        "num_hidden_layers": 2, "upsample_groups": 64, "vector_quantization_hidden_dimension": 16,
    } if tiny else {
        "codebook_dim": 256, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 64,
        "num_attention_heads": 8, "num_key_value_heads": 8, "num_filters": 64,
        "num_hidden_layers": 8, "upsample_groups": 512, "vector_quantization_hidden_dimension": 256,
    }  # fmt: skip
    return {
        **size,
        "attention_bias": False, "attention_dropout": 0.0, "audio_channels": 1, "codebook_size": 2048,
        "compress": 2, "dilation_growth_rate": 2, "frame_rate": 12.5, "hidden_act": "gelu",
        "initializer_range": 0.02, "kernel_size": 7, "last_kernel_size": 3,
        "layer_scale_initial_scale": 0.01, "max_position_embeddings": 8000, "norm_eps": 1e-5,
        "num_quantizers": 32, "num_residual_layers": 1, "num_semantic_quantizers": 1,
        "pad_mode": "constant", "residual_kernel_size": 3, "rope_theta": 10000.0,
        "sampling_rate": SAMPLE_RATE, "sliding_window": 250, "trim_right_ratio": 1.0,
        "upsampling_ratios": [8, 6, 5, 4], "use_cache": False, "use_causal_conv": True,
        "use_conv_shortcut": False, "use_streaming": False,
    }  # fmt: skip


def _codec_decoder_config(tiny: bool) -> dict[str, Any]:
    size = {
        "codebook_dim": 64, "decoder_dim": 64, "head_dim": 16, "hidden_size": 64,
        "intermediate_size": 128, "latent_dim": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 4,
    } if tiny else {
        "codebook_dim": 512, "decoder_dim": 1536, "head_dim": 64, "hidden_size": 512,
        "intermediate_size": 1024, "latent_dim": 1024, "num_attention_heads": 16,
        "num_hidden_layers": 8, "num_key_value_heads": 16,
    }  # fmt: skip
    return {
        **size,
        "attention_bias": False, "attention_dropout": 0.0, "codebook_size": 2048, "hidden_act": "silu",
        "layer_scale_initial_scale": 0.01, "max_position_embeddings": 8000,
        "num_quantizers": NUM_CODEBOOKS, "num_semantic_quantizers": 1, "rms_norm_eps": 1e-5,
        "rope_theta": 10000, "sliding_window": 72, "upsample_rates": [8, 5, 4, 3],
        "upsampling_ratios": [2, 2],
    }  # fmt: skip


def speech_config(shape: Shape) -> dict[str, Any]:
    """The content of `speech_tokenizer/config.json`."""
    tiny = _GEOMETRY[shape].tiny
    return {
        "architectures": ["Qwen3TTSTokenizerV2Model"],
        "decode_upsample_rate": HOP,
        "decoder_config": _codec_decoder_config(tiny),
        "encode_downsample_rate": HOP,
        "encoder_config": _codec_encoder_config(tiny),
        "encoder_valid_num_quantizers": NUM_CODEBOOKS,
        "input_sample_rate": SAMPLE_RATE,
        "model_type": "qwen3_tts_tokenizer_12hz",
        "output_sample_rate": SAMPLE_RATE,
    }


_GENERATION_CONFIG = {
    "do_sample": True, "max_new_tokens": 8192, "repetition_penalty": 1.05, "subtalker_dosample": True,
    "subtalker_temperature": 0.9, "subtalker_top_k": 50, "subtalker_top_p": 1.0, "temperature": 0.9,
    "top_k": 50, "top_p": 1.0,
}  # fmt: skip
_PREPROCESSOR_CONFIG = {
    "padding_side": "left", "padding_value": 0.0, "processor_class": "Qwen3TTSProcessor",
    "return_attention_mask": True,
}  # fmt: skip
_SPEECH_PREPROCESSOR_CONFIG = {
    "chunk_length_s": None, "feature_extractor_type": "EncodecFeatureExtractor", "feature_size": 1,
    "overlap": None, "padding_side": "right", "padding_value": 0.0, "return_attention_mask": True,
    "sampling_rate": SAMPLE_RATE,
}  # fmt: skip


def json_files(shape: Shape, mode: VoiceMode) -> dict[str, dict[str, Any]]:
    """Contents of the files that are neither weights nor text, by their path in the checkpoint."""
    return {
        "config.json": root_config(shape, mode),
        "generation_config.json": _GENERATION_CONFIG,
        "preprocessor_config.json": _PREPROCESSOR_CONFIG,
        "speech_tokenizer/config.json": speech_config(shape),
        "speech_tokenizer/preprocessor_config.json": _SPEECH_PREPROCESSOR_CONFIG,
    }


def shape_config(shape: Shape, mode: VoiceMode = "base") -> ModelConfig:
    """The configuration that a loader reads from these files."""
    files = json_files(shape, mode)
    return ModelConfig.from_dicts(files["config.json"], files["speech_tokenizer/config.json"])
