"""Samples as a client wants them: resampled without seams, clamped, rounded, little-endian."""

from __future__ import annotations

import numpy as np
import soxr

from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.serving.native_messages import AudioFormat

_NOTHING = np.zeros(0, dtype=np.float32)


class PcmEncoder:
    """Turns 24 kHz float32 chunks into the bytes of one format.

    `flush` ends a segment: the resampler gives out what it holds back (up to a tenth of a second)
    and begins anew. Segments are utterances of their own, so nothing rings across the seam, and
    the bytes of each are exactly its duration.
    """

    def __init__(self, audio: AudioFormat) -> None:
        self._audio = audio
        self._resampler: soxr.ResampleStream | None = None

    def encode(self, samples: np.ndarray) -> bytes:
        """A chunk, float32 [n]; what comes out may be shorter, or longer, than what went in."""
        if self._audio.sample_rate == SAMPLE_RATE:
            return self._to_bytes(samples)
        if self._resampler is None:
            self._resampler = soxr.ResampleStream(
                SAMPLE_RATE, self._audio.sample_rate, 1, dtype="float32", quality="HQ"
            )
        return self._to_bytes(self._resampler.resample_chunk(samples))

    def flush(self) -> bytes:
        """The rest of a segment."""
        resampler, self._resampler = self._resampler, None
        return (
            b"" if resampler is None else self._to_bytes(resampler.resample_chunk(_NOTHING, last=True))
        )

    def _to_bytes(self, samples: np.ndarray) -> bytes:
        clamped: np.ndarray = np.clip(samples, -1.0, 1.0)
        if self._audio.encoding == "pcm_f32le":
            return clamped.astype("<f4", copy=False).tobytes()
        return np.rint(clamped * 32_767.0).astype("<i2").tobytes()
