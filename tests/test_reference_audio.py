"""Reference audio: what is decoded, and what is refused before it costs time or memory."""

from __future__ import annotations

import io
import os
import struct

import numpy as np
import pytest
import soundfile
from test_speaker_encoder import speech_like

from qwen_megakernel.prompt.reference_audio import (
    MAX_REFERENCE_BYTES,
    VoiceError,
    decode_reference,
    read_reference,
)


def file_bytes(audio, rate=24_000, container="WAV", subtype=None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, audio, rate, format=container, subtype=subtype)
    return out.getvalue()


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * hertz * t)


GOOD = file_bytes(tone(1.5, 24_000), container="FLAC")


def refused(data: bytes, match: str) -> None:
    with pytest.raises(VoiceError, match=match) as caught:
        decode_reference(data)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value), "an address"


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("container", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16")]
)
def test_decode_gives_the_tone_back(rate, channels, container, subtype):
    audio = tone(1.2, rate)
    if channels == 2:  # the mean of the two is the tone
        audio = np.stack([1.5 * audio, 0.5 * audio], axis=1)
    decoded = decode_reference(file_bytes(audio, rate, container, subtype))
    assert decoded.dtype == np.float32
    assert decoded.ndim == 1
    assert abs(len(decoded) - 1.2 * 24_000) <= 1
    middle = slice(2_400, 24_000)
    np.testing.assert_allclose(decoded[middle], tone(1.2, 24_000)[middle], atol=2e-3)


@pytest.mark.slow  # the import of numba
def test_decode_resamples_as_the_official_code():
    librosa = pytest.importorskip("librosa")
    audio = speech_like(44_100).numpy()
    expected = librosa.resample(audio, orig_sr=44_100, target_sr=24_000)
    decoded = decode_reference(file_bytes(audio, 44_100, subtype="FLOAT"))
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize(
    ("rate", "seconds", "samples"),
    [(8_000, 4, 96_000), (11_025, 4, 96_001), (22_050, 4, 96_001), (44_100, 4, 96_001),
     (44_100, 1.5, 36_000), (44_100, 1.003, 24_072), (48_000, 4, 96_000), (88_200, 1.003, 24_073),
     (88_200, 4, 96_001), (96_000, 4, 96_000), (176_400, 4, 96_001), (192_000, 4, 96_000)],
)  # fmt: skip
def test_a_resampled_reference_is_as_long_as_the_official_package_makes_it(rate, seconds, samples):
    """Whole seconds at 44.1 kHz have one sample more than expected, and so one frame more."""
    assert len(decode_reference(file_bytes(tone(seconds, rate), rate))) == samples


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "DOUBLE"), ("WAV", "ULAW"),
     ("WAV", "ALAW"), ("WAVEX", "PCM_16"), ("FLAC", "PCM_24"), ("FLAC", "PCM_S8")],
)  # fmt: skip
def test_decode_takes_the_other_sample_formats(container, subtype):
    decoded = decode_reference(file_bytes(tone(1, 24_000), 24_000, container, subtype))
    np.testing.assert_allclose(decoded, tone(1, 24_000), atol=0.03)


def with_wav_sizes(data: bytes, riff: int | None, size: int | None) -> bytes:
    """The WAV file with other sizes of file and samples in its header; None keeps a size."""
    sized, at = bytearray(data), data.find(b"data")
    for offset, value in ((4, riff), (at + 4, size)):
        if value is not None:
            struct.pack_into("<I", sized, offset, value)
    return bytes(sized)


@pytest.mark.parametrize(
    ("riff", "size"),
    [
        (0xFFFF_FFFF, 0xFFFF_FFFF),  # ffmpeg
        (0x7FFF_F024, 0x7FFF_F000),  # sox
        (0x7FFF_FFFF, 0x7FFF_FFFF - 36),
        (2_000_000_036, 2_000_000_000),  # `wave` with a guess of 10**9 frames
        (0x3FFF_FFFF + 36, 0x3FFF_FFFF),
        (0x3FFF_FFFF, 0x3FFF_FFFF - 36),
        (0, 0),  # a writer that never filled in the sizes
        (36, 0),  # the header of an empty file
        (None, 0),
        (None, 0xFFFF_FFFF),
        (0, None),
        (36, None),
        (0xFFFF_FFFF, None),
    ],
)
def test_decode_takes_a_wav_whose_writer_could_not_fill_in_its_sizes(riff, size):
    whole = file_bytes(tone(1.5, 24_000))
    decoded = decode_reference(with_wav_sizes(whole, riff, size))
    np.testing.assert_array_equal(decoded, decode_reference(whole))


def test_decode_finds_the_samples_behind_other_chunks():
    whole = file_bytes(tone(1.5, 24_000))
    at = whole.find(b"data")
    notes = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    decoded = decode_reference(with_wav_sizes(whole[:at] + notes + whole[at:], 0, 0))
    np.testing.assert_array_equal(decoded, decode_reference(whole))


@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_length_limits(container):
    def of(samples: int) -> bytes:
        return file_bytes(tone(samples / 8_000, 8_000), 8_000, container)

    assert len(decode_reference(of(8_000))) == 24_000
    assert len(decode_reference(of(240_000))) == 720_000
    refused(of(7_920), "0.99 s long, allowed: 1 to 30 s")
    refused(of(240_800), "30.10 s long, allowed: 1 to 30 s")


def with_flac_length(data: bytes, samples: int) -> bytes:
    """The FLAC file with another total in its header (36 bits that end at byte 26)."""
    head = (int.from_bytes(data[18:26], "big") >> 36 << 36) | samples
    return data[:18] + head.to_bytes(8, "big") + data[26:]


def test_nothing_is_decoded_before_the_header_is_checked(monkeypatch):
    """A file is refused by the length in its header, and no more than that length is decoded."""
    asked = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, n, **kw: asked.append(n) or read(self, n, **kw)
    )
    refused(with_flac_length(GOOD, 24_000 * 3600), "3600.00 s long")
    refused(file_bytes(tone(31, 8_000), 8_000), "31.00 s long")
    refused(with_flac_length(GOOD, 0), "does not say how long")
    assert asked == []
    bomb = file_bytes(np.full(24_000 * 40, 0.1), container="FLAC")
    assert len(decode_reference(with_flac_length(bomb, 24_000 * 2))) == 48_000
    assert asked == [48_000]


def test_too_many_bytes_are_refused_unparsed(monkeypatch):
    monkeypatch.setattr(soundfile, "SoundFile", None)
    refused(GOOD + bytes(MAX_REFERENCE_BYTES), f"allowed: 1 to {MAX_REFERENCE_BYTES}")


@pytest.mark.parametrize("container", ["OGG", "MP3", "AIFF", "W64", "RF64", "AU", "CAF"])
def test_other_containers_never_reach_the_decoder(container, monkeypatch):
    data = file_bytes(tone(1.5, 24_000), container=container)
    monkeypatch.setattr(soundfile, "SoundFile", None)
    refused(data, "begins with b.*allowed: WAV or FLAC")


@pytest.mark.parametrize(
    "data",
    [b"", b"RIFF", b"fLaC", b"RIFF\0\0\0\0WAVE", b"RIFF\0\0\0\0AVI LIST", b"ID3\4" + GOOD,
     b"fLaC" + b"\xff" * 99, b"RIFF\x20\0\0\0WAVE" + b"\xff" * 99, b"\xff\xfb\x90\x00" * 500,
     b"RIFX" + b"\0" * 99, b"file:///etc/passwd", b"http://127.0.0.1/a.wav",
     bytes(range(256)) * 16, b"\0" * 4096],
)  # fmt: skip
def test_garbage_is_refused(data):
    refused(data, "reference audio")


@pytest.mark.parametrize("subtype", ["GSM610", "MS_ADPCM", "IMA_ADPCM", "G721_32"])
def test_other_codecs_inside_wav_are_refused(subtype):
    refused(file_bytes(tone(1.5, 8_000), 8_000, subtype=subtype), f"{subtype}, allowed: WAV")


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_truncated_files_are_refused(container, keep):
    audio = speech_like(48_000).numpy()
    data = file_bytes(audio, container=container)
    refused(data[: int(len(data) * keep)], "cut off|does not decode")


@pytest.mark.parametrize("riff", [0, 36, 0xFFFF_FFFF])
def test_a_truncated_wav_is_refused_by_the_one_size_that_is_filled_in(riff):
    data = with_wav_sizes(file_bytes(tone(3, 24_000)), riff, None)
    refused(data[: len(data) // 2], "cut off: 72022 of 144044 bytes")


def test_a_wav_of_hours_that_was_cut_off_is_refused():
    whole = 44 + 3 * 3600 * 48_000
    refused(with_wav_sizes(file_bytes(tone(3, 24_000)), whole - 8, whole - 44), "cut off")


def test_a_wav_without_samples_is_refused():
    empty = file_bytes(tone(3, 24_000))[:44]
    for riff, size in ((36, 0), (0, 0), (0xFFFF_FFFF, 0xFFFF_FFFF)):
        refused(with_wav_sizes(empty, riff, size), "0.00 s long")


def test_only_the_first_chunks_are_searched_for_samples_without_a_size():
    """A file of a million empty chunks costs no time."""
    whole = file_bytes(tone(1.5, 24_000))
    at = whole.find(b"data")
    junk = b"JUNK" + bytes(4)
    assert len(decode_reference(with_wav_sizes(whole[:at] + 90 * junk + whole[at:], 0, 0))) == 36_000
    refused(with_wav_sizes(whole[:at] + 110 * junk + whole[at:], 0, 0), "0.00 s long")


def test_fewer_samples_than_stated_are_refused(monkeypatch):
    refused(with_flac_length(GOOD, 48_000), "does not decode")
    # A decoder that stops without an error, as libsndfile does for some formats.
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **kw: read(self, n - 1, **kw))
    refused(GOOD, "35999 of 36000 samples")


def test_corrupt_flac_is_refused():
    data = bytearray(file_bytes(speech_like(48_000).numpy(), container="FLAC"))
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    refused(bytes(data), "cut off|does not decode")


@pytest.mark.parametrize(
    ("audio", "rate", "match"),
    [
        (np.zeros((48_000, 3)) + 0.1, 24_000, "3 channels, allowed: 1 or 2"),
        (tone(1.5, 6_000), 6_000, "6000 samples a second, allowed: 8000 to 192000"),
        (tone(1.5, 200_000), 200_000, "200000 samples a second"),
        (np.zeros(48_000), 24_000, "silent"),
        (np.full(48_000, 5e-4), 24_000, "silent"),
        (np.stack([tone(2, 24_000), -tone(2, 24_000)], 1), 24_000, "silent"),
        (np.where(np.arange(48_000) == 777, np.nan, 0.1), 24_000, "not finite"),
        (np.where(np.arange(48_000) == 777, np.inf, 0.1), 24_000, "not finite"),
        (np.where(np.arange(48_000) == 777, -np.inf, 0.1), 24_000, "not finite"),
        (tone(2, 24_000) * 32768, 24_000, "peak of 1.638e.04, allowed: up to 4"),
    ],
)
def test_unusable_audio_is_refused(audio, rate, match):
    refused(file_bytes(audio, rate, subtype="FLOAT"), match)


@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_damaged_bytes_give_audio_or_a_voice_error(container):
    """No other error is raised, and all samples are finite."""
    rng = np.random.default_rng(5)
    whole = file_bytes(speech_like(9_000).numpy(), 8_000, container)
    outcomes = set()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(8, 60 if rng.random() < 0.8 else len(data))] = rng.integers(256)
        try:
            audio = decode_reference(bytes(data))
            assert audio.dtype == np.float32
            assert np.isfinite(audio).all()
            outcomes.add("audio")
        except VoiceError as error:
            outcomes.add(str(error)[:20])
    assert len(outcomes) > 2


def test_decode_opens_no_file(monkeypatch):
    def no_open(*args, **kwargs):
        raise AssertionError("a file was opened")

    monkeypatch.setattr("builtins.open", no_open)
    monkeypatch.setattr(os, "open", no_open)
    assert len(decode_reference(GOOD)) == 36_000


def test_read_reference(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(GOOD)
    assert read_reference(path) == GOOD
    with pytest.raises(VoiceError, match=rf"^{tmp_path}/b\.wav: not a file$"):
        read_reference(tmp_path / "b.wav")
    with pytest.raises(VoiceError, match="not a file"):
        read_reference(tmp_path)
    with path.open("wb") as file:
        file.truncate(MAX_REFERENCE_BYTES + 1)  # sparse
    with pytest.raises(VoiceError, match=r"a\.wav: .*allowed: 1 to"):
        read_reference(path)
