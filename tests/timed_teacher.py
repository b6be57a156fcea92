"""The demonstration voice's teacher, flite, and when it begins each word."""

from __future__ import annotations

import ctypes

import numpy as np
import soxr

from qwen_megakernel.config import SAMPLE_RATE
from training.teacher import Teacher, _Wave

_BEGIN = b"R:SylStructure.daughter1.daughter1.R:Segment.p.end"
_END = b"R:SylStructure.daughtern.daughtern.R:Segment.end"
_HEAD = 3
"""The first item is the fourth pointer of a relation (flite's `cst_relation`)."""


class TimedTeacher(Teacher):
    """flite in this process."""

    def __init__(self) -> None:
        """Raises `OSError` if a library is missing."""
        super().__init__()
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        for name, result, arguments in (
            ("flite_synth_text", pointer, (text, pointer)),
            ("utt_wave", ctypes.POINTER(_Wave), (pointer,)),
            ("utt_relation", pointer, (pointer, text)),
            ("item_next", pointer, (pointer,)),
            ("ffeature_float", ctypes.c_float, (pointer, text)),
            ("ffeature_string", text, (pointer, text)),
            ("delete_utterance", None, (pointer,)),
        ):
            function = getattr(self._flite, name)
            function.restype, function.argtypes = result, arguments

    def say_timed(self, text: str, voice: str) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
        """Samples, int16 at 24 kHz, and each word with its begin and end in seconds."""
        flite, words = self._flite, []
        utterance = flite.flite_synth_text(text.encode("ascii", "ignore"), self._voices[voice])
        wave = flite.utt_wave(utterance).contents
        samples = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).astype(np.float32)
        word = ctypes.cast(flite.utt_relation(utterance, b"Word"), ctypes.POINTER(ctypes.c_void_p))[
            _HEAD
        ]
        while word:
            begin, end = (flite.ffeature_float(word, path) for path in (_BEGIN, _END))
            words.append((flite.ffeature_string(word, b"name").decode(), begin, end))
            word = flite.item_next(word)
        audio = soxr.resample(samples, wave.sample_rate, SAMPLE_RATE)
        flite.delete_utterance(utterance)
        return np.rint(np.clip(audio, -32_768, 32_767)).astype("<i2"), words
