"""Samples in a client's format: resampled without seams, clamped, rounded or companded."""

from __future__ import annotations

import io

import numpy as np
import soundfile
import soxr

from qwen_megakernel.config import SAMPLE_RATE

_NOTHING = np.zeros(0, dtype=np.float32)
_COMPANDED = {"pcm_mulaw": "ULAW", "pcm_alaw": "ALAW"}
"""Encodings with 8 bits a sample (G.711), and their names in libsndfile."""


class Resampler:
    """Converts 24 kHz chunks to another rate.

    `flush` returns the samples that are held back (up to a tenth of a second) and begins anew. The next
    chunk belongs to another utterance, so nothing rings across the seam.
    """

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self._stream: soxr.ResampleStream | None = None

    def resample(self, samples: np.ndarray) -> np.ndarray:
        """Resample a chunk, float32 [n] at 24 kHz. The result may be longer or shorter than the chunk's
        time."""
        if self._sample_rate == SAMPLE_RATE:
            return samples
        if self._stream is None:
            self._stream = soxr.ResampleStream(
                SAMPLE_RATE, self._sample_rate, 1, dtype="float32", quality="HQ"
            )
        resampled: np.ndarray = self._stream.resample_chunk(samples)
        return resampled

    def flush(self) -> np.ndarray:
        """The rest, float32 [n]. All samples since the last call then last as long as the input."""
        stream, self._stream = self._stream, None
        rest: np.ndarray = _NOTHING if stream is None else stream.resample_chunk(_NOTHING, last=True)
        return rest


class PcmEncoder:
    """Turns 24 kHz float32 chunks into the bytes of one format.

    `flush` ends a segment. Each segment is an utterance of its own, and its bytes have exactly its
    duration.
    """

    def __init__(self, encoding: str, sample_rate: int) -> None:
        """`encoding`: pcm_s16le, pcm_f32le, pcm_mulaw or pcm_alaw."""
        self._encoding = encoding
        self._resampler = Resampler(sample_rate)

    def encode(self, samples: np.ndarray) -> bytes:
        """Encode a chunk, float32 [n]. The result may be shorter or longer than the chunk."""
        return self._to_bytes(self._resampler.resample(samples))

    def flush(self) -> bytes:
        """The rest of a segment."""
        return self._to_bytes(self._resampler.flush())

    def _to_bytes(self, samples: np.ndarray) -> bytes:
        clamped: np.ndarray = np.clip(samples, -1.0, 1.0)
        if self._encoding == "pcm_f32le":
            return clamped.astype("<f4", copy=False).tobytes()
        rounded = np.rint(clamped * 32_767.0).astype("<i2")
        if self._encoding in _COMPANDED:
            return _compand(rounded, _COMPANDED[self._encoding])
        return rounded.tobytes()


def _compand(samples: np.ndarray, subtype: str) -> bytes:
    with io.BytesIO() as file:
        # No byte of a raw file depends on the rate.
        soundfile.write(file, samples, SAMPLE_RATE, format="RAW", subtype=subtype)
        return file.getvalue()
