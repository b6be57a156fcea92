"""Geometry and parameters, read from `config.json`. Standard library only.

The defaults of the official configuration classes differ from the released checkpoints. So no default
here can contradict a checkpoint. A missing key of the geometry is an error that names the key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SAMPLE_RATE = 24_000
"""Samples per second of every waveform inside the project, mono."""
NUM_CODEBOOKS = 16
"""Codes per frame: one of the talker, fifteen of the code predictor."""
HOP = 1920
"""Samples per frame (80 ms)."""
FRAME_S = HOP / SAMPLE_RATE
"""Seconds per frame."""
MAX_PARTS = 1024
"""The most layers, heads, quantizers ... of a part. More are refused before anything is allocated."""
MAX_SIZE = 1 << 20
"""The largest width, number of positions or vocabulary."""
NUM_CONTROL_CODES = 1024
"""The talker's vocabulary ends with so many ids that are not codes. EOS is one of them."""

MIN_TEMPERATURE = 1e-6
"""Logits that are divided by less than this overflow in fp32."""

VoiceMode = Literal["base", "custom_voice", "voice_design"]


class ConfigError(ValueError):
    """This project cannot run a `config.json`. One line names the key."""


def _get(section: dict[str, Any], key: str, where: str, kind: type | tuple[type, ...]) -> Any:
    if key not in section:
        raise ConfigError(f"{where}: key {key!r} is missing")
    value = section[key]
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ConfigError(f"{where}: {key} is {value!r}, expected {_kind_name(kind)}")
    return value


def _kind_name(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(k.__name__ for k in kinds)


def get_count(section: dict[str, Any], key: str, where: str) -> int:
    """A whole number of at least 1 that a model can have. Raises `ConfigError`."""
    return _get_between(section, key, where, 1, MAX_PARTS if key.startswith("num_") else MAX_SIZE)


def get_counts(section: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    """A non-empty list of numbers as in `get_count`. Raises `ConfigError`."""
    values = _get(section, key, where, (list, tuple))
    if not values:
        raise ConfigError(f"{where}: {key} is empty")
    return tuple(get_count({key: value}, key, where) for value in values)


def get_positive(section: dict[str, Any], key: str, where: str) -> float:
    """A finite number above 0. Raises `ConfigError`."""
    value = _get(section, key, where, (int, float))
    if not 0 < value < 1e30:  # NaN fails too
        raise ConfigError(f"{where}: {key} is {str(value)[:40]}, expected a number above 0")
    return float(value)


def _get_between(section: dict[str, Any], key: str, where: str, low: int, high: int) -> int:
    value: int = _get(section, key, where, int)
    if not low <= value <= high:
        raise ConfigError(f"{where}: {key} is {str(value)[:40]}, expected {low} to {high}")
    return value


def _get_dims(section: dict[str, Any], keys: dict[str, str], where: str) -> dict[str, int]:
    return {field: get_count(section, key, where) for field, key in keys.items()}


def _get_ids(section: dict[str, Any], key: str, where: str, vocab_size: int) -> dict[str, int]:
    """Lower-case name -> id below `vocab_size`; empty if the key is missing."""
    ids = _get({key: section.get(key) or {}}, key, where, dict)
    inside = f"{where}.{key}"
    return {name.lower(): _get_between(ids, name, inside, 0, vocab_size - 1) for name in ids}


_TRANSFORMER_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """A Qwen3 decoder stack: RMSNorm, grouped-query attention with QK-norm, SwiGLU."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float

    @staticmethod
    def fields_from(section: dict[str, Any], where: str) -> dict[str, Any]:
        """The constructor's arguments from one section of `config.json`."""
        if section.get("attention_bias"):
            raise ConfigError(f"{where}: attention_bias is true, which no released model has")
        if section.get("use_sliding_window"):
            raise ConfigError(f"{where}: use_sliding_window is true, which no released model has")
        if section.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{where}: hidden_act is {section['hidden_act']!r}, expected 'silu'")
        dims: dict[str, Any] = _get_dims(section, _TRANSFORMER_KEYS, where)
        if dims["num_heads"] % dims["num_kv_heads"]:
            raise ConfigError(f"{where}: num_attention_heads is not a multiple of num_key_value_heads")
        dims["rope_theta"] = get_positive(section, "rope_theta", where)
        dims["rms_norm_eps"] = get_positive(section, "rms_norm_eps", where)
        return dims


@dataclass(frozen=True, slots=True)
class PredictorConfig(TransformerConfig):
    """The code predictor: codes 1..15 of a frame, plain RoPE, 16 positions a frame."""

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> PredictorConfig:
        """Read the section `talker_config.code_predictor_config`. Raises `ConfigError`."""
        where = "talker_config.code_predictor_config"
        codebooks = _get(section, "num_code_groups", where, int)
        if codebooks != NUM_CODEBOOKS:
            raise ConfigError(f"{where}: num_code_groups is {codebooks}, expected {NUM_CODEBOOKS}")
        return cls(**TransformerConfig.fields_from(section, where))


@dataclass(frozen=True, slots=True)
class TalkerConfig(TransformerConfig):
    """The talker: it takes text rows and code embeddings, and gives code 0 and the hidden row."""

    text_vocab_size: int
    text_hidden_size: int
    mrope_section: tuple[int, int, int]
    codec_pad_id: int
    codec_bos_id: int
    codec_eos_id: int
    codec_think_id: int
    codec_nothink_id: int
    codec_think_bos_id: int
    codec_think_eos_id: int
    language_ids: dict[str, int]
    """Lower-case language name -> codec id, dialects included."""
    speaker_ids: dict[str, int]
    """Lower-case preset speaker name -> codec id; empty for Base."""
    speaker_dialects: dict[str, str]
    """Preset speaker name -> the dialect it speaks when the language is Chinese or auto."""

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> TalkerConfig:
        """Read the section `talker_config`. Raises `ConfigError`."""
        where = "talker_config"
        fields = TransformerConfig.fields_from(section, where)
        rope = _get(section, "rope_scaling", where, dict)
        mrope = get_counts(rope, "mrope_section", f"{where}.rope_scaling")
        if len(mrope) != 3 or sum(mrope) * 2 != fields["head_dim"]:
            raise ConfigError(
                f"{where}.rope_scaling: mrope_section {list(mrope)} does not cover half of head_dim "
                f"{fields['head_dim']}"
            )
        vocab_size = fields["vocab_size"]
        ids = {
            f"codec_{name}_id": _get_between(section, f"codec_{key}_id", where, 0, vocab_size - 1)
            for name, key in {
                "pad": "pad", "bos": "bos", "eos": "eos_token", "think": "think",
                "nothink": "nothink", "think_bos": "think_bos", "think_eos": "think_eos",
            }.items()
        }  # fmt: skip
        dialects = _get(
            {"spk_is_dialect": section.get("spk_is_dialect") or {}}, "spk_is_dialect", where, dict
        )
        return cls(
            **fields,
            **ids,
            text_vocab_size=get_count(section, "text_vocab_size", where),
            text_hidden_size=get_count(section, "text_hidden_size", where),
            mrope_section=mrope,
            language_ids=_get_ids(section, "codec_language_id", where, vocab_size),
            speaker_ids=_get_ids(section, "spk_id", where, vocab_size),
            speaker_dialects={str(k).lower(): str(v).lower() for k, v in dialects.items() if v},
        )

    @property
    def languages(self) -> list[str]:
        """Names that a caller may pass as `language`, `auto` first. The speaker decides on a dialect."""
        return ["auto", *sorted(n for n in self.language_ids if "dialect" not in n)]


@dataclass(frozen=True, slots=True)
class SpeakerEncoderConfig:
    """ECAPA-TDNN (https://arxiv.org/abs/2005.07143) on a log-mel spectrogram."""

    mel_dim: int
    enc_dim: int
    enc_channels: tuple[int, ...]
    enc_kernel_sizes: tuple[int, ...]
    enc_dilations: tuple[int, ...]
    enc_attention_channels: int
    enc_res2net_scale: int
    enc_se_channels: int
    sample_rate: int

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> SpeakerEncoderConfig:
        """Read the section `speaker_encoder_config`. Raises `ConfigError`."""
        # The released files name only enc_dim and sample_rate. The rest are defaults of the official
        # class, which match the weights of this module.
        defaults: dict[str, Any] = {
            "mel_dim": 128, "enc_dim": 1024, "enc_channels": [512, 512, 512, 512, 1536],
            "enc_kernel_sizes": [5, 3, 3, 3, 1], "enc_dilations": [1, 2, 3, 4, 1],
            "enc_attention_channels": 128, "enc_res2net_scale": 8, "enc_se_channels": 128,
            "sample_rate": SAMPLE_RATE,
        }  # fmt: skip
        known = {**defaults, **section}
        where = "speaker_encoder_config"
        values: dict[str, Any] = {
            name: (get_counts if isinstance(value, (list, tuple)) else get_count)(known, name, where)
            for name, value in defaults.items()
        }
        config = cls(**values)
        if config.sample_rate != SAMPLE_RATE:
            raise ConfigError(
                f"speaker_encoder_config: sample_rate is {config.sample_rate}, expected {SAMPLE_RATE}"
            )
        return config


@dataclass(frozen=True, slots=True)
class CodecConfig:
    """The 12.5 Hz codec decoder of `speech_tokenizer/`: it turns 16 codes into 1920 samples."""

    codebook_size: int
    codebook_dim: int
    latent_dim: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    upsample_rates: tuple[int, ...]
    upsampling_ratios: tuple[int, ...]
    decoder_dim: int

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> CodecConfig:
        """Read the section `decoder_config` of `speech_tokenizer/`. Raises `ConfigError`."""
        where = "speech_tokenizer decoder_config"
        keys = {
            name: _TRANSFORMER_KEYS.get(name, name)
            for name in (
                "codebook_size", "codebook_dim", "latent_dim", "hidden_size", "intermediate_size",
                "num_layers", "num_heads", "num_kv_heads", "head_dim", "sliding_window",
                "max_positions", "decoder_dim",
            )
        }  # fmt: skip
        if section.get("num_quantizers") != NUM_CODEBOOKS:
            raise ConfigError(
                f"{where}: num_quantizers is {section.get('num_quantizers')}, expected {NUM_CODEBOOKS}"
            )
        rates = get_counts(section, "upsample_rates", where)
        ratios = get_counts(section, "upsampling_ratios", where)
        product = 1
        for factor in rates + ratios:
            product *= factor
        if product != HOP:
            raise ConfigError(f"{where}: upsampling by {product}, expected {HOP} samples a frame")
        return cls(
            **_get_dims(section, keys, where),
            rope_theta=get_positive(section, "rope_theta", where),
            rms_norm_eps=get_positive(section, "rms_norm_eps", where),
            upsample_rates=rates,
            upsampling_ratios=ratios,
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The contents of the two `config.json` files of a checkpoint."""

    mode: VoiceMode
    """The kind of prompts that the model was trained on (`tts_model_type`)."""
    size: str
    """`tts_model_size`: "0b6" or "1b7"; "" if the file does not say."""
    talker: TalkerConfig
    predictor: PredictorConfig
    codec: CodecConfig
    speaker_encoder: SpeakerEncoderConfig | None
    """Only Base checkpoints have one."""
    codec_encoder: dict[str, Any] | None
    """`encoder_config`, as `transformers.MimiConfig` takes it; None: no in-context cloning."""
    im_start_id: int
    im_end_id: int
    tts_pad_id: int
    tts_bos_id: int
    tts_eos_id: int

    @classmethod
    def from_dicts(cls, root: dict[str, Any], speech: dict[str, Any]) -> ModelConfig:
        """Parse the root and the `speech_tokenizer/` configurations.

        Raises:
            ConfigError: the model type is wrong, a key is missing, or a value is not supported.
        """
        _expect_type(root, "config.json", "model_type", ("qwen3_tts",))
        _expect_type(root, "config.json", "tokenizer_type", ("qwen3_tts_tokenizer_12hz",))
        _expect_type(root, "config.json", "tts_model_type", ("base", "custom_voice", "voice_design"))
        _expect_type(speech, "speech_tokenizer/config.json", "model_type", ("qwen3_tts_tokenizer_12hz",))
        talker = _get(root, "talker_config", "config.json", dict)
        codebooks = _get(talker, "num_code_groups", "talker_config", int)
        if codebooks != NUM_CODEBOOKS:
            raise ConfigError(f"talker_config: num_code_groups is {codebooks}, expected {NUM_CODEBOOKS}")
        base = root["tts_model_type"] == "base"
        last_id = get_count(talker, "text_vocab_size", "talker_config") - 1
        return cls(
            mode=root["tts_model_type"],
            size=str(root.get("tts_model_size") or ""),
            talker=TalkerConfig.from_dict(talker),
            predictor=PredictorConfig.from_dict(
                _get(talker, "code_predictor_config", "talker_config", dict)
            ),
            codec=CodecConfig.from_dict(
                _get(speech, "decoder_config", "speech_tokenizer/config.json", dict)
            ),
            speaker_encoder=(
                SpeakerEncoderConfig.from_dict(_get(root, "speaker_encoder_config", "config.json", dict))
                if base
                else None
            ),
            codec_encoder=(
                dict(_get(speech, "encoder_config", "speech_tokenizer/config.json", dict))
                if "encoder_config" in speech
                else None
            ),
            im_start_id=_get_between(root, "im_start_token_id", "config.json", 0, last_id),
            im_end_id=_get_between(root, "im_end_token_id", "config.json", 0, last_id),
            tts_pad_id=_get_between(root, "tts_pad_token_id", "config.json", 0, last_id),
            tts_bos_id=_get_between(root, "tts_bos_token_id", "config.json", 0, last_id),
            tts_eos_id=_get_between(root, "tts_eos_token_id", "config.json", 0, last_id),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `config.json` and `speech_tokenizer/config.json` of a local checkpoint."""
        return cls.from_dicts(
            read_json(folder / "config.json"), read_json(folder / "speech_tokenizer/config.json")
        )


def _expect_type(section: dict[str, Any], where: str, key: str, allowed: tuple[str, ...]) -> None:
    if section.get(key) not in allowed:
        raise ConfigError(f"{where}: {key} is {section.get(key)!r}, expected {' or '.join(allowed)}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises `ConfigError` if the file is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: file is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN fails too
        raise ValueError(f"{name} is {value}, allowed: {low} to {high}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one code is drawn from its logits, in the order of Hugging Face `generate`.

    `temperature` 0 takes the most likely code. A temperature below `MIN_TEMPERATURE` becomes 0.
    `top_k` 0 and `top_p` 1 keep all codes.
    """

    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 10.0)
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        _check_range("top_k", self.top_k, 0, 1 << 16)
        _check_range("repetition_penalty", self.repetition_penalty, 0.1, 10.0)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}, allowed: above 0, up to 1")


SAMPLINGS = ("original", "checkpoint")
"""Sources of the default sampling: `GenerationParams()`, or `read_generation_config`."""

MAX_UTTERANCE_FRAMES = 2048
"""The most frames of one utterance, 163.84 s. A longer text is spoken in parts."""


@dataclass(frozen=True, slots=True)
class Guards:
    """Limits that end utterances which the model does not end (0.3 to 0.5 % of them). 0 switches a limit
    off.
    """

    repeat_frames: int = 40
    """Stop after so many frames in a row with the same code 0 (`finish_reason` "repeat")."""
    silence_s: float = 4.0
    """Stop after so many seconds of near-silent audio once all text was fed ("silence")."""
    silence_rms: float = 1e-3
    """A frame with a lower root mean square counts as silent (1e-3 is -60 dBFS)."""
    base_frames: int = 38
    """The length budget is this number of frames ..."""
    frames_per_token: int = 12
    """... plus so many for each text token ("length")."""

    def budget(self, num_text_tokens: int) -> int | None:
        """The most frames of an utterance with so many text tokens; None is unlimited."""
        if not self.frames_per_token:
            return None
        return self.base_frames + self.frames_per_token * num_text_tokens


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Everything that decides a turn's codes besides text and voice."""

    talker: SamplingParams = SamplingParams(0.3, 15, 1.0, 1.05)
    predictor: SamplingParams = SamplingParams(0.9, 50, 1.0)
    seed: int = 0
    """The key of the turn's Philox draws, 0 .. 2**64 - 1."""
    min_frames: int = 2
    """EOS is suppressed in the first so many frames (`min_new_tokens` of the official model)."""
    max_frames: int | None = None
    """The caller's limit on the turn's frames; None speaks the whole text."""
    guards: Guards = field(default_factory=Guards)

    def __post_init__(self) -> None:
        _check_range("seed", self.seed, 0, 2**64 - 1)
        _check_range("min_frames", self.min_frames, 0, 2**31)
        if self.max_frames is not None:
            _check_range("max_frames", self.max_frames, 1, 2**31)
