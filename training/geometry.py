"""The tiny model's dimensions: its `config.json` files, in the official layout."""

from __future__ import annotations

from typing import Any

from qwen_megakernel.config import NUM_CONTROL_CODES, ModelConfig
from qwen_megakernel.synth.config import json_files

CODEBOOK_SIZE = 128
"""Seven bits for each code. Four synthetic voices need no more, and embeddings and heads stay small."""
HIDDEN = 256
_OFFICIAL_CODEBOOK_SIZE = 2048

_STACK = {
    "head_dim": 64, "hidden_size": HIDDEN, "intermediate_size": 768, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def files() -> dict[str, dict[str, Any]]:
    """Contents of the JSON files, by their path in the checkpoint."""
    contents = json_files("tiny", "base")
    _shrink_talker(contents["config.json"]["talker_config"])
    contents["config.json"]["speaker_encoder_config"] = {
        "enc_dim": HIDDEN, "sample_rate": 24_000, "mel_dim": 128,
        "enc_channels": [64, 64, 64, 64, 192], "enc_kernel_sizes": [5, 3, 3, 3, 1],
        "enc_dilations": [1, 2, 3, 4, 1], "enc_attention_channels": 32, "enc_res2net_scale": 8,
        "enc_se_channels": 32,
    }  # fmt: skip
    speech = contents["speech_tokenizer/config.json"]
    speech["decoder_config"].update(
        codebook_size=CODEBOOK_SIZE, codebook_dim=128, decoder_dim=256, head_dim=64, hidden_size=192,
        intermediate_size=384, latent_dim=192, num_attention_heads=3, num_hidden_layers=2,
        num_key_value_heads=3, sliding_window=16,
    )  # fmt: skip
    # The encoder is the trainer's own, not Mimi's, and is not exported.
    del speech["encoder_config"]
    return contents


def _shrink_talker(talker: dict[str, Any]) -> None:
    shift = CODEBOOK_SIZE - _OFFICIAL_CODEBOOK_SIZE
    for key, value in talker.items():
        if key.startswith("codec_") and isinstance(value, int):
            talker[key] = value + shift
    talker.update(
        _STACK,
        num_hidden_layers=6,
        codec_language_id={"english": talker["codec_language_id"]["english"] + shift},
        text_hidden_size=HIDDEN,
        vocab_size=CODEBOOK_SIZE + NUM_CONTROL_CODES,
    )
    talker["code_predictor_config"].update(
        _STACK,
        intermediate_size=1024,
        num_hidden_layers=1,  # it runs fifteen times a frame, and a CPU feels each layer
        layer_types=["full_attention"],
        vocab_size=CODEBOOK_SIZE,
    )


def config() -> ModelConfig:
    """The configuration that a loader reads from these files."""
    contents = files()
    return ModelConfig.from_dicts(contents["config.json"], contents["speech_tokenizer/config.json"])
