"""Where audio has sound, by the power of each 10 ms."""

import numpy as np
import pytest

from qwen_megakernel.serving.loudness import LevelMeter
from qwen_megakernel.serving.sound_map import SoundMap


def power(*levels):
    """Of levels in dBFS."""
    return [10 ** (level / 10) for level in levels]


def sound_map(*parts):
    """Of parts: seconds of sound if positive, of silence if negative."""
    result = SoundMap()
    for seconds in parts:
        result.add(power(*[-20.0 if seconds > 0 else -80.0] * round(abs(seconds) * 100)))
    return result


def test_sound_leaves_out_silence_at_both_ends_and_pauses():
    found = sound_map(-0.3, 1.0, -0.5, 0.4, -0.2)
    assert found.duration_s == pytest.approx(2.4)
    assert found.sound_s == pytest.approx(1.4)
    assert found.pauses == [pytest.approx((1.0, 0.5))]


def test_a_short_silence_is_within_a_word():
    found = sound_map(0.5, -0.1, 0.5)
    assert found.pauses == []
    assert found.sound_s == pytest.approx(1.1)


def test_silence_at_the_end_is_no_pause_until_sound_follows():
    found = sound_map(0.5, -1.0)
    assert found.pauses == []
    found.add(power(-20.0))
    assert found.pauses == [pytest.approx((0.5, 1.0))]


def test_a_louder_sound_makes_silence_of_what_was_sound():
    found = SoundMap()
    found.add(power(*[-50.0] * 30))
    assert found.sound_s == pytest.approx(0.3)
    found.add(power(*[-10.0] * 20))
    assert found.sound_s == pytest.approx(0.2)


def test_times_of_sound_are_times_of_audio():
    found = sound_map(-0.3, 1.0, -0.5, 0.4)
    assert found.begins_at(0.0) == pytest.approx(0.3)
    assert found.begins_at(0.25) == pytest.approx(0.55)
    assert found.begins_at(1.0) == pytest.approx(1.8), "behind the pause"
    assert found.ends_at(1.0) == pytest.approx(1.3), "before the pause"
    assert found.begins_at(1.2) == found.ends_at(1.2) == pytest.approx(2.0)
    assert found.ends_at(9.0) == pytest.approx(2.2), "not beyond the sound"


def test_noise_below_the_voice_is_silence():
    found = SoundMap()
    found.add(power(*[-50.0] * 30, *[-12.0] * 50, *[-50.0] * 30, *[-15.0] * 50))
    assert found.begins_at(0.0) == pytest.approx(0.3)
    assert found.pauses == [pytest.approx((0.5, 0.3))]
    quiet = SoundMap()
    quiet.add(power(*[-70.0] * 30, *[-40.0] * 50))
    assert quiet.begins_at(0.0) == pytest.approx(0.3), "a soft voice has a soft beginning"


def test_silence_alone_is_no_sound():
    found = sound_map(-1.0)
    assert (found.sound_s, found.pauses) == (0.0, [])


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("rate", [8000, 16_000, 24_000, 48_000])
def test_levels_do_not_depend_on_the_chunks(rate, dtype):
    draw = np.random.default_rng(1)
    loudness = np.repeat([0.0, 0.5, 0.05, 0.005], rate // 20)
    samples = draw.choice([-1.0, 1.0], len(loudness)) * loudness
    if dtype == np.int16:
        samples = np.rint(samples * 32_768)
    samples = samples.astype(dtype)
    whole = LevelMeter(rate).add(samples)
    expected = np.repeat([0.0, 0.25, 0.0025, 0.000025], 5)
    assert whole == pytest.approx(expected, rel=0.01)
    pieces = LevelMeter(rate)
    cuts = np.sort(draw.integers(0, len(samples), 20))
    assert [level for piece in np.split(samples, cuts) for level in pieces.add(piece)] == whole


def test_a_segment_begins_with_a_window_of_its_own():
    meter = LevelMeter(24_000)
    assert meter.add(np.ones(100, np.float32)) == []
    meter.end_segment()
    assert meter.add(np.zeros(240, np.float32)) == [0.0]
