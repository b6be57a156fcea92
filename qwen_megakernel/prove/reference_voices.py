"""Voices for a checkpoint without voices: clones of recordings that the demonstration voice makes."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import soundfile

from qwen_megakernel.config import SAMPLE_RATE, GenerationParams
from qwen_megakernel.prompt.voice import Voice, VoiceCloner
from qwen_megakernel.prove.utterances import sentences
from qwen_megakernel.tools.demo import CHECKPOINT
from qwen_megakernel.tts_model import TTSDecoder

NAMES = ("rms", "slt")
"""Speakers of the demonstration voice that a recogniser understands best."""
SPOKEN = 2
"""Sentences of a recording: about five seconds."""


def recordings() -> dict[str, tuple[np.ndarray, str]]:
    """Recordings by name: float32 samples [n] at 24 kHz, and the words in them."""
    text = sentences()[-SPOKEN:]
    with TTSDecoder.load(CHECKPOINT, device="cpu", num_slots=2) as tts:
        tts.load_voices(CHECKPOINT / "voices")
        params = GenerationParams(seed=1)
        made = {
            name: np.concatenate([tts.synthesize(one, name, params=params) for one in text])
            for name in NAMES
        }
    return {name: (samples, " ".join(text)) for name, samples in made.items()}


def cloned(cloner: VoiceCloner, report: Callable[[str], None]) -> dict[str, Voice]:
    """Clone each recording by its speaker embedding, and also in context if the checkpoint can."""
    report("cloning voices from the demonstration voice")
    found = {}
    for name, (samples, text) in recordings().items():
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
        found[name] = cloner.clone(buffer.getvalue())
        if cloner.codec_encoder is not None:
            found[f"{name}-in-context"] = cloner.clone(buffer.getvalue(), text)
    return found
