"""Malformed configurations are refused at once, with one line that names the key."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest

from qwen_megakernel.codec.encoder import MimiShape
from qwen_megakernel.config import ConfigError, ModelConfig, SamplingParams, read_json

TALKER = "root.talker_config"
PREDICTOR = f"{TALKER}.code_predictor_config"
SPEAKER = "root.speaker_encoder_config"
DECODER = "speech.decoder_config"
ENCODER = "speech.encoder_config"

MALFORMED = {
    f"{TALKER}.num_hidden_layers": (10**9, 0, -1, 2.0, True, "2"),
    f"{PREDICTOR}.num_hidden_layers": (10**9, 0),
    f"{DECODER}.num_hidden_layers": (10**9, 0),
    f"{TALKER}.num_attention_heads": (0,),
    f"{TALKER}.num_key_value_heads": (0,),
    f"{TALKER}.hidden_size": (10**30,),
    f"{TALKER}.text_hidden_size": (-4,),
    f"{TALKER}.text_vocab_size": (2**31, 0),
    f"{TALKER}.max_position_embeddings": (10**12,),
    f"{TALKER}.rope_theta": (math.inf, math.nan, 0, -1, 10**400),
    f"{TALKER}.rms_norm_eps": (math.inf, math.nan, 0),
    f"{TALKER}.rope_scaling.mrope_section": (["a", "b", "c"], [-12, 34, 10], [12.0, 10, 10], []),
    f"{TALKER}.codec_bos_id": (2**31, -1),
    f"{TALKER}.codec_eos_token_id": (2**31, 3072),
    f"{TALKER}.codec_language_id.english": (2**31, "x", math.inf, None),
    f"{TALKER}.spk_is_dialect": ([1],),
    "root.tts_bos_token_id": (2**31, 1024, -1),
    "root.im_start_token_id": (-5,),
    f"{SPEAKER}.enc_res2net_scale": (0,),
    f"{SPEAKER}.enc_dim": ("x",),
    f"{SPEAKER}.enc_channels": (["a"], 3, []),
    f"{SPEAKER}.enc_kernel_sizes": ([0, 3, 3, 3, 1],),
    f"{DECODER}.upsample_rates": (["a"], "ab", [None]),
    f"{DECODER}.upsampling_ratios": ([math.inf], [-2, -2], [2.0, 2.0], "ab"),
    f"{DECODER}.sliding_window": (10**12,),
    f"{DECODER}.decoder_dim": (10**12,),
    f"{ENCODER}.num_hidden_layers": (10**9,),
    f"{ENCODER}.num_residual_layers": (10**9,),
    f"{ENCODER}.num_quantizers": (10**9,),
    f"{ENCODER}.num_attention_heads": (0,),
    f"{ENCODER}.num_filters": ("x",),
    f"{ENCODER}.rope_theta": ("x",),
    f"{ENCODER}.upsampling_ratios": (["a"], 5),
}  # fmt: skip
"""Values by the path of their key."""


def parse(configs: dict[str, Any]) -> None:
    config = ModelConfig.from_dicts(configs["root"], configs["speech"])
    assert config.codec_encoder is not None
    MimiShape.from_dict(config.codec_encoder)


@pytest.fixture(scope="module")
def configs(tiny_base) -> dict[str, Any]:
    names = {"root": "config.json", "speech": "speech_tokenizer/config.json"}
    found = {part: read_json(tiny_base / name) for part, name in names.items()}
    parse(found)
    return found


@pytest.mark.parametrize("path", MALFORMED)
def test_a_malformed_value_is_named(configs, path):
    *sections, key = path.split(".")
    for value in MALFORMED[path]:
        changed = copy.deepcopy(configs)
        functools.reduce(dict.__getitem__, sections, changed)[key] = value
        with pytest.raises(ConfigError, match=key) as refused:
            parse(changed)
        assert "\n" not in str(refused.value)


def test_deeply_nested_json_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ConfigError, match="not readable as JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("temperature", [0.0, -0.0, 1e-45, 1e-30, 9.9e-7])
def test_a_temperature_that_would_overflow_takes_the_most_likely_code(temperature):
    assert SamplingParams(temperature) == SamplingParams(0.0)
    assert SamplingParams(1e-6).temperature == 1e-6
