"""Audio files that are written while the speech is made: PCM, WAV, MP3, Opus in Ogg, AAC and FLAC.

PyAV compresses. It is imported when a compressed format is first asked for, and a server without
it still speaks WAV and PCM.
"""

from __future__ import annotations

import importlib.util
import struct
from dataclasses import dataclass
from io import RawIOBase
from typing import Any, Protocol

import numpy as np

from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.serving.native_messages import AudioFormat
from qwen_megakernel.serving.pcm import PcmEncoder

_UNKNOWN_SIZE = 0xFFFFFFFF
"""What players take for "until the end" in a WAV header."""


class AudioEncoder(Protocol):
    """Turns the speech of one answer into the bytes of one file."""

    compresses: bool
    """Whether the work is too long for the event loop's thread."""

    def encode(self, samples: np.ndarray) -> bytes:
        """Bytes after a chunk, float32 [n] at 24 kHz; there may be none yet."""

    def finish(self) -> bytes:
        """The last bytes of the file."""


@dataclass(frozen=True, slots=True)
class _Compression:
    container: str
    codec: str
    options: dict[str, str]
    """Of the container: what keeps it from waiting and from seeking."""


_COMPRESSIONS = {
    "mp3": _Compression("mp3", "libmp3lame", {"write_xing": "0", "id3v2_version": "0"}),
    "opus": _Compression("ogg", "libopus", {"page_duration": "20000"}),
    "aac": _Compression("adts", "aac", {}),
    "flac": _Compression("flac", "flac", {}),
}
MEDIA_TYPES = {
    "pcm": "audio/pcm",
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
}
"""Formats, and what HTTP calls them."""


def is_encodable(name: str) -> bool:
    """Whether a format of `MEDIA_TYPES` can be written here: the compressed ones need PyAV."""
    return name not in _COMPRESSIONS or importlib.util.find_spec("av") is not None


def open_encoder(name: str) -> AudioEncoder:
    """An encoder for a format of `MEDIA_TYPES`. Audio is mono; PCM and WAV are 16 bit at 24 kHz."""
    if name in _COMPRESSIONS:
        return _CompressedEncoder(_COMPRESSIONS[name])
    return _PlainEncoder(_wav_header() if name == "wav" else b"")


def _wav_header() -> bytes:
    """Of a file whose length is not known yet."""
    sample_format = struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    return b"".join(
        [
            b"RIFF" + struct.pack("<I", _UNKNOWN_SIZE) + b"WAVE",
            b"fmt " + struct.pack("<I", len(sample_format)) + sample_format,
            b"data" + struct.pack("<I", _UNKNOWN_SIZE),
        ]
    )


class _PlainEncoder:
    compresses = False

    def __init__(self, header: bytes) -> None:
        self._header = header
        self._pcm = PcmEncoder(AudioFormat())

    def encode(self, samples: np.ndarray) -> bytes:
        header, self._header = self._header, b""
        return header + self._pcm.encode(samples)

    def finish(self) -> bytes:
        header, self._header = self._header, b""
        return header


class _Sink(RawIOBase):
    """Keeps what a container writes until it is taken. It cannot seek."""

    def __init__(self) -> None:
        self._written = bytearray()

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Keep bytes; all of them are taken."""
        self._written += data
        return len(memoryview(data))

    def take(self) -> bytes:
        """What was written since the last call."""
        taken = bytes(self._written)
        self._written.clear()
        return taken


class _CompressedEncoder:
    compresses = True

    def __init__(self, compression: _Compression) -> None:
        import av

        self._sink = _Sink()
        self._container = av.open(
            self._sink,
            "w",
            format=compression.container,
            container_options={"flush_packets": "1", **compression.options},
        )
        stream = self._container.add_stream(compression.codec, rate=SAMPLE_RATE, layout="mono")
        assert isinstance(stream, av.AudioStream)
        self._stream = stream
        self._num_samples = 0

    def encode(self, samples: np.ndarray) -> bytes:
        import av

        clamped = np.clip(samples, -1.0, 1.0).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(clamped[None], format="flt", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        frame.pts = self._num_samples
        self._num_samples += len(samples)
        self._container.mux(self._stream.encode(frame))
        return self._sink.take()

    def finish(self) -> bytes:
        if self._num_samples:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._sink.take()
