"""Write audio files while the speech is generated: raw, WAV, MP3, Opus in Ogg, AAC and FLAC.

PyAV compresses. It is imported when a client first asks for a compressed format. A server without
PyAV still writes raw and WAV.
"""

from __future__ import annotations

import importlib.util
import struct
from dataclasses import dataclass
from functools import cache
from io import RawIOBase
from typing import Any, Protocol

import numpy as np

from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.serving.pcm import PcmEncoder, Resampler

_UNKNOWN_SIZE = 0xFFFFFFFF
"""A size in a WAV header that players read as "until the end"."""
_WAV_TAGS = {"pcm_s16le": (1, 2), "pcm_f32le": (3, 4), "pcm_alaw": (6, 1), "pcm_mulaw": (7, 1)}
"""WAV's format tag and the bytes of a sample, by encoding."""
_RAW_TYPES = {"pcm_mulaw": "audio/mulaw", "pcm_alaw": "audio/alaw"}
_CONTAINER_OPTIONS = {
    "mp3": {"write_xing": "0", "id3v2_version": "0"},
    "ogg": {"page_duration": "20000"},
}
"""Options that keep a container from holding audio back and from seeking."""
_CODECS = {"mp3": "libmp3lame", "opus": "libopus", "aac": "aac", "flac": "flac"}
_CONTAINER_TYPES = {
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "adts": "audio/aac",
    "flac": "audio/flac",
}


@dataclass(frozen=True, slots=True)
class FileFormat:
    """A file of mono audio."""

    container: str
    """raw, wav, mp3, ogg, adts or flac."""
    encoding: str
    """pcm_s16le, pcm_f32le, pcm_mulaw or pcm_alaw in raw and wav; otherwise mp3, opus, aac or flac."""
    sample_rate: int = SAMPLE_RATE
    bit_rate: int | None = None
    """Bits a second; None is the encoder's default."""

    @property
    def media_type(self) -> str:
        """The format's media type in HTTP."""
        if self.container == "raw":
            return _RAW_TYPES.get(self.encoding, "audio/pcm")
        return _CONTAINER_TYPES[self.container]

    @property
    def encodable(self) -> bool:
        """Whether it can be written here: a compressed format needs PyAV."""
        return self.encoding not in _CODECS or pyav_is_installed()


@cache
def pyav_is_installed() -> bool:
    """Whether PyAV is installed. Looking for it takes a millisecond, and each greeting asks."""
    return importlib.util.find_spec("av") is not None


class AudioEncoder(Protocol):
    """Turns the speech of one answer into the bytes of one file."""

    compresses: bool
    """Whether the encoder compresses, which takes too long for the event loop's thread."""

    def encode(self, samples: np.ndarray) -> bytes:
        """Add a chunk, float32 [n] at 24 kHz. Returns the bytes that are ready, possibly none."""

    def finish(self) -> bytes:
        """End the file. Returns its last bytes."""


def open_encoder(audio: FileFormat) -> AudioEncoder:
    """An encoder for a format that is `encodable`."""
    return _CompressedEncoder(audio) if audio.encoding in _CODECS else _PlainEncoder(audio)


def _wav_header(audio: FileFormat) -> bytes:
    """The header of a WAV file whose length is not known yet."""
    tag, sample_bytes = _WAV_TAGS[audio.encoding]
    byte_rate = sample_bytes * audio.sample_rate
    sample_format = struct.pack(
        "<HHIIHH", tag, 1, audio.sample_rate, byte_rate, sample_bytes, 8 * sample_bytes
    )
    fact = b""
    if audio.encoding != "pcm_s16le":  # other formats have an extension and give the number of samples
        sample_format += struct.pack("<H", 0)
        fact = b"fact" + struct.pack("<II", 4, _UNKNOWN_SIZE)
    return b"".join(
        [
            b"RIFF" + struct.pack("<I", _UNKNOWN_SIZE) + b"WAVE",
            b"fmt " + struct.pack("<I", len(sample_format)) + sample_format,
            fact,
            b"data" + struct.pack("<I", _UNKNOWN_SIZE),
        ]
    )


class _PlainEncoder:
    compresses = False

    def __init__(self, audio: FileFormat) -> None:
        self._header = _wav_header(audio) if audio.container == "wav" else b""
        self._pcm = PcmEncoder(audio.encoding, audio.sample_rate)

    def encode(self, samples: np.ndarray) -> bytes:
        header, self._header = self._header, b""
        return header + self._pcm.encode(samples)

    def finish(self) -> bytes:
        header, self._header = self._header, b""
        return header + self._pcm.flush()


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

    def __init__(self, audio: FileFormat) -> None:
        import av

        self._sink = _Sink()
        self._container = av.open(
            self._sink,
            "w",
            format=audio.container,
            container_options={"flush_packets": "1", **_CONTAINER_OPTIONS.get(audio.container, {})},
        )
        stream = self._container.add_stream(
            _CODECS[audio.encoding], rate=audio.sample_rate, layout="mono"
        )
        assert isinstance(stream, av.AudioStream)
        if audio.bit_rate is not None:
            stream.bit_rate = audio.bit_rate
        self._stream = stream
        self._sample_rate = audio.sample_rate
        self._resampler = Resampler(audio.sample_rate)
        self._num_samples = 0

    def encode(self, samples: np.ndarray) -> bytes:
        self._compress(self._resampler.resample(samples))
        return self._sink.take()

    def finish(self) -> bytes:
        self._compress(self._resampler.flush())
        if self._num_samples:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._sink.take()

    def _compress(self, samples: np.ndarray) -> None:
        import av

        if not len(samples):
            return
        clamped = np.clip(samples, -1.0, 1.0).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(clamped[None], format="flt", layout="mono")
        frame.sample_rate = self._sample_rate
        frame.pts = self._num_samples
        self._num_samples += len(samples)
        self._container.mux(self._stream.encode(frame))
