"""Samples and files in every format that a dialect can ask for."""

import io
import itertools
import subprocess
import sys

import av
import numpy as np
import pytest
import soundfile

from qwen_megakernel.serving import audio_encoding
from qwen_megakernel.serving.audio_encoding import FileFormat, open_encoder
from qwen_megakernel.serving.pcm import PcmEncoder

ENCODINGS = {"pcm_s16le": 1 / 32_767, "pcm_f32le": 1e-6, "pcm_mulaw": 0.02, "pcm_alaw": 0.02}
"""How much a decoded sample may differ from the encoded one."""
SECONDS = np.arange(24_000) / 24_000
TONE = np.float32(0.5 * np.sin(2 * np.pi * 440 * SECONDS))


def chunks(samples=TONE, num=1920):
    return (samples[start : start + num] for start in range(0, len(samples), num))


def encoded(audio):
    encoder = open_encoder(audio)
    return b"".join([*map(encoder.encode, chunks()), encoder.finish()])


def decoded(data, rate, audio):
    """float32 samples, by libsndfile."""
    subtypes = {"pcm_s16le": "PCM_16", "pcm_f32le": "FLOAT", "pcm_mulaw": "ULAW", "pcm_alaw": "ALAW"}
    raw = {"samplerate": rate, "channels": 1, "format": "RAW", "subtype": subtypes[audio]}
    return soundfile.read(io.BytesIO(data), dtype="float32", **raw)[0]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_encoded_is_what_was_said(encoding):
    encoder = PcmEncoder(encoding, 24_000)
    data = b"".join([*map(encoder.encode, chunks()), encoder.flush()])
    assert np.abs(decoded(data, 24_000, encoding) - TONE).max() <= ENCODINGS[encoding]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 32_000, 44_100, 48_000])
def test_a_segment_is_exactly_its_time_at_every_rate(encoding, rate):
    encoder = PcmEncoder(encoding, rate)
    for _ in range(2):
        data = b"".join([*map(encoder.encode, chunks()), encoder.flush()])
        samples = decoded(data, rate, encoding)
        assert len(samples) == rate
        tone = np.float32(0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate))
        inside = slice(rate // 10, -rate // 10)
        assert np.abs(samples[inside] - tone[inside]).max() < 0.02


@pytest.mark.parametrize(("encoding", "rate"), [*itertools.product(ENCODINGS, [8_000, 24_000, 44_100])])
def test_wav_is_raw_behind_a_header_that_players_read(encoding, rate):
    raw = encoded(FileFormat("raw", encoding, rate))
    wav = encoded(FileFormat("wav", encoding, rate))
    assert wav.endswith(b"data\xff\xff\xff\xff" + raw)
    samples, found = soundfile.read(io.BytesIO(wav), dtype="float32")
    assert found == rate
    np.testing.assert_array_equal(samples, decoded(raw, rate, encoding))
    with av.open(io.BytesIO(wav)) as file:
        stream = file.streams.audio[0]
        assert (stream.rate, stream.channels, stream.codec_context.name) == (rate, 1, encoding)
        assert sum(frame.samples for frame in file.decode(audio=0)) == rate


@pytest.mark.parametrize(
    ("audio", "media_type"),
    [
        (FileFormat("mp3", "mp3", 22_050, 48_000), "audio/mpeg"),
        (FileFormat("ogg", "opus", 48_000, 12_000), "audio/ogg"),
        (FileFormat("adts", "aac", 22_050, 48_000), "audio/aac"),
        (FileFormat("flac", "flac", 48_000), "audio/flac"),
    ],
)
def test_a_compressed_file_has_its_rate_and_length(audio, media_type):
    assert audio.media_type == media_type
    data = encoded(audio)
    if audio.bit_rate:
        assert len(data) < 3 * audio.bit_rate / 8  # with what the containers need
    with av.open(io.BytesIO(data)) as file:
        assert file.streams.audio[0].rate == audio.sample_rate
        num_samples = sum(frame.samples for frame in file.decode(audio=0))
    assert 1.0 <= num_samples / audio.sample_rate <= 1.15


def test_without_pyav_the_plain_formats_are_left(monkeypatch):
    monkeypatch.setattr(audio_encoding, "pyav_is_installed", lambda: False)
    assert FileFormat("wav", "pcm_mulaw").encodable
    assert not FileFormat("mp3", "mp3").encodable


def test_pyav_is_not_loaded_before_it_is_needed():
    code = "import sys, qwen_megakernel.serving.app; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0
