"""The sampling that a checkpoint asks for: its `generation_config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_megakernel.config import ConfigError, GenerationParams, SamplingParams, read_json

_SAMPLING_KEYS = (("do_sample", "", 1.05), ("subtalker_dosample", "subtalker_", 1.0))
"""For talker and predictor in a `generation_config.json`: the switch, the prefix of the keys, and
the repetition penalty if the file has none. It never has one for the predictor."""


def read_generation_config(folder: Path) -> GenerationParams:
    """Read the sampling in a checkpoint's `generation_config.json`, as the official package does.

    If a key or the file is missing, the official package's default applies. Limits are not read.

    Raises:
        ConfigError: a value is out of range or of another type, or the file is not a JSON object.
    """
    path = folder / "generation_config.json"
    values = read_json(path) if path.is_file() else {}
    try:
        talker, predictor = (_read_sampling(values, *names) for names in _SAMPLING_KEYS)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return GenerationParams(talker=talker, predictor=predictor)


def _read_sampling(
    values: dict[str, Any], switch: str, prefix: str, repetition_penalty: float
) -> SamplingParams:
    kinds = {"temperature": (int, float), "top_k": (int,), "top_p": (int, float)}
    if not prefix:
        kinds["repetition_penalty"] = (int, float)
    found: dict[str, Any] = {"repetition_penalty": repetition_penalty}
    for name, kind in kinds.items():
        value = values.get(prefix + name)
        if value is not None:
            if type(value) not in kind:
                raise TypeError(f"{prefix}{name} is {value!r:.40}, expected a number")
            found[name] = value
    if values.get(switch) is False:
        found["temperature"] = 0.0
    return SamplingParams(**found)
