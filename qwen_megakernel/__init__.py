"""Real-time Qwen3-TTS: text in, 24 kHz speech out, one frame at a time.

The import of this package imports neither torch nor CUDA. The names below do, at their first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["GenerationParams", "SamplingParams", "TTSDecoder", "Voice"]

_HOME = {
    "GenerationParams": "config",
    "SamplingParams": "config",
    "TTSDecoder": "tts_model",
    "Voice": "prompt.voice",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
