"""Reference recordings: untrusted WAV or FLAC bytes to samples.

Size, container, format and length are checked in this order. Each check comes before the code that it
protects. Nothing here turns a client's string into a path.
"""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path

import numpy as np
import soundfile
import soxr

from qwen_megakernel.config import SAMPLE_RATE

MIN_REFERENCE_S = 1.0
MAX_REFERENCE_S = 30.0
MAX_REFERENCE_BYTES = 20 * 1024 * 1024
MIN_SOURCE_RATE = 8_000
MAX_SOURCE_RATE = 192_000

_SILENT_PEAK = 1e-3
_FULL_SCALE = 0.999
_CLIPPED_RUN = 3
"""Samples at full scale in a row that count as clipped. A loud sound reaches full scale with one or
two."""
_MAX_CLIPPED = 0.001
"""Share of a recording in clipped runs that nobody hears."""
_MAX_PEAK = 4.0
"""No mastering goes this far above full scale. A float file that does has another unit, such as
32768."""
_SUBTYPES = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
"""Allowed formats, with libsndfile's names. WAV may also hold MP3 or GSM, whose decoders a client must
not reach."""

_PLACEHOLDER = 0x3FFF_0000
"""From this size on, a size is a placeholder. Programs that write to a pipe, and cannot know the size,
put 0x3FFFFFFF, 2,000,000,000, 0x7FFFF000 or 0xFFFFFFFF. A real recording of 1 GiB is far above the
limit, whether it is cut off or not."""
_MAX_CHUNKS = 100
"""Chunks that are searched for the samples. Studio recorders write about ten before them."""


class VoiceError(ValueError):
    """A recording, voice or voice file that cannot be used. The message is one line: what is given and
    what is allowed."""


def read_reference(path: Path) -> bytes:
    """Read a recording that the operator named. Never call it with a client's string.

    Raises:
        VoiceError: the file is not regular, cannot be read, or is above 20 MiB.
    """
    try:
        if not path.is_file():
            raise VoiceError("not a file")
        _check_num_bytes(path.stat().st_size)
        return path.read_bytes()
    except OSError as error:
        raise VoiceError(f"{path}: {error.strerror}") from None
    except VoiceError as error:
        raise VoiceError(f"{path}: {error}") from None


def decode_reference(data: bytes, *, refuse_clipped: bool = False) -> np.ndarray:
    """Decode a WAV or FLAC file.

    Args:
        data: the file: up to 20 MiB, 1 to 30 s, 8 to 192 kHz, mono or stereo, which is averaged.
        refuse_clipped: whether a recording that was too loud is an error.

    Returns:
        `[samples]` float32 at 24 kHz, full scale 1.

    Raises:
        VoiceError: anything else, and silence. Memory is bounded for any bytes: format, rate, channels
            and length come from the header, and no more is decoded than the header says.
    """
    _check_num_bytes(len(data))
    _check_container(data)
    try:
        with soundfile.SoundFile(io.BytesIO(_with_data_size(data))) as file:
            _check_header(file)
            expected, rate = file.frames, file.samplerate
            frames = file.read(expected, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:  # its str() begins with the address of the BytesIO
        raise VoiceError(f"reference audio does not decode ({error.error_string})") from None
    if len(frames) != expected:
        raise VoiceError(f"reference audio is cut off: {len(frames)} of {expected} samples are there")
    audio = frames.mean(axis=1)
    _check_level(audio)
    if refuse_clipped:
        _check_clipping(frames)
    return audio if rate == SAMPLE_RATE else _resample(audio, rate)


def _resample(audio: np.ndarray, rate: int) -> np.ndarray:
    """Resample `[samples]` at `rate` to 24 kHz. The result is the official package's, sample for sample.

    That package calls `librosa.resample`, which uses soxr's HQ and rounds the length up in floating
    point: 4 s at 44.1 kHz become 96,001 samples. The codes agree only if the lengths do.
    """
    num_samples = math.ceil(len(audio) * (SAMPLE_RATE / rate))
    resampled = soxr.resample(audio, rate, SAMPLE_RATE, quality="HQ")[:num_samples]
    return np.pad(resampled, (0, num_samples - len(resampled)))


def _check_num_bytes(num_bytes: int) -> None:
    if not 0 < num_bytes <= MAX_REFERENCE_BYTES:
        raise VoiceError(f"reference audio has {num_bytes} bytes, allowed: 1 to {MAX_REFERENCE_BYTES}")


def _check_container(data: bytes) -> None:
    # This comes before libsndfile, which guesses among twenty formats, such as MP3 and Ogg.
    if data[:4] == b"fLaC":
        return
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise VoiceError(f"reference audio begins with {bytes(data[:4])!r}, allowed: WAV or FLAC files")
    (size,) = struct.unpack_from("<I", data, 4)
    _check_end(data, size + 8)
    at = _data_chunk(data)
    # If the RIFF is whole but a chunk claims more, its writer was careless. libsndfile accepts that.
    if at is not None and abs(len(data) - size - 8) > 1:
        (size,) = struct.unpack_from("<I", data, at + 4)
        _check_end(data, at + 8 + size)


def _check_end(data: bytes, end: int) -> None:
    # A difference of one byte is a missing pad byte.
    if len(data) + 1 < end < _PLACEHOLDER:
        raise VoiceError(f"reference audio is cut off: {len(data)} of {end} bytes are there")


def _data_chunk(data: bytes) -> int | None:
    """Where the header of a WAV file's `data` chunk begins, or None if it is not among the first
    chunks."""
    at = 12
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            return None
        name, size = struct.unpack_from("<4sI", data, at)
        if name == b"data":
            return at
        at += 8 + size + size % 2
    return None


def _with_data_size(data: bytes) -> bytes:
    """Fill in the size of the samples, up to the end of the file, if its writer left 0.

    libsndfile reads to the end if the size is too large, but a size of 0 means no samples to it.
    """
    at = _data_chunk(data) if data[:4] == b"RIFF" else None
    if at is None or data[at + 4 : at + 8] != bytes(4):
        return data
    num_bytes = len(data) - at - 8
    return data[: at + 4] + struct.pack("<I", num_bytes) + data[at + 8 :]


def _check_header(file: soundfile.SoundFile) -> None:
    if file.subtype not in _SUBTYPES:
        allowed = "WAV (PCM, float, A-law, mu-law) or FLAC"
        raise VoiceError(f"reference audio is {file.format} with {file.subtype}, allowed: {allowed}")
    if file.channels not in (1, 2):
        raise VoiceError(f"reference audio has {file.channels} channels, allowed: 1 or 2")
    if not MIN_SOURCE_RATE <= file.samplerate <= MAX_SOURCE_RATE:
        raise VoiceError(
            f"reference audio has {file.samplerate} samples a second, "
            f"allowed: {MIN_SOURCE_RATE} to {MAX_SOURCE_RATE}"
        )
    if file.frames >= 1 << 62:  # libsndfile's value for "unknown"
        raise VoiceError("reference audio does not say how long it is: its FLAC header lacks the length")
    seconds = file.frames / file.samplerate
    if not MIN_REFERENCE_S <= seconds <= MAX_REFERENCE_S:
        raise VoiceError(
            f"reference audio is {seconds:.2f} s long, "
            f"allowed: {MIN_REFERENCE_S:g} to {MAX_REFERENCE_S:g} s"
        )


def _check_level(audio: np.ndarray) -> None:
    peak = float(np.abs(audio).max())
    if not np.isfinite(peak):  # max and abs pass NaN on
        raise VoiceError("reference audio has samples that are not finite numbers")
    if peak < _SILENT_PEAK:
        raise VoiceError(
            f"reference audio is silent: its peak is {peak:.2g}, allowed: {_SILENT_PEAK:g} up"
        )
    if peak > _MAX_PEAK:
        raise VoiceError(
            f"reference audio has a peak of {peak:.4g}, allowed: up to {_MAX_PEAK:g} (full scale is 1)"
        )


def _check_clipping(frames: np.ndarray) -> None:
    """`[samples, channels]`. Each channel is checked alone, because an average hides clipping."""
    full = np.abs(frames) >= _FULL_SCALE
    inside = full[: 1 - _CLIPPED_RUN].copy()
    for offset in range(1, _CLIPPED_RUN):
        inside &= full[offset : len(full) - _CLIPPED_RUN + 1 + offset]
    share = float(inside.mean(axis=0).max())
    if share > _MAX_CLIPPED:
        raise VoiceError(
            f"reference audio is clipped: {100 * share:.1f} % of it is at full scale; "
            "record it again, less loud"
        )
