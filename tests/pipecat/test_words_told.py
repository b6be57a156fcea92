"""When the service tells its words: with all audio that is there by then, and before they are played."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from pipecat_client import playback as playback_module
from pipecat_client.megakernel_tts import MegakernelTTSService
from pipecat_client.playback import HOLD_S, Gaps, Playback
from pipecat_client.sentence_ends import SentenceEnds
from qwen_megakernel.serving.spoken_text import TextReader
from qwen_megakernel.serving.word_timing import Pace

RATE = 16_000


class Clock:
    """Takes the place of `time` in a module."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(playback_module, "time", clock)
    return clock


def sound(seconds):
    return np.full(round(seconds * RATE), 8000, "<i2").tobytes()


def reply(text, pace):
    result = Playback.begin(pace, RATE, SentenceEnds("en"))
    result.append(text, TextReader)
    result.complete_segment()
    return result


def texts(words):
    return [word.text for word in words]


def test_words_are_told_shortly_before_they_are_played(clock):
    words = reply("aaaa bbbb cccc dddd", Pace(10.0))
    words.receive(sound(1.9))
    assert texts(words.due_words()) == ["aaaa"]
    clock.now += 0.5 - HOLD_S
    assert texts(words.due_words()) == []
    clock.now += 0.01
    assert texts(words.due_words()) == ["bbbb"]
    clock.now += 0.5
    assert texts(words.due_words()) == ["cccc"]
    assert texts(words.end_segment()) == ["dddd"]


def test_audio_that_comes_first_makes_later_words_right(clock):
    words = reply("aaaa bbbb cccc dddd", Pace(1000.0))  # far too fast
    words.receive(sound(0.1))
    assert texts(words.due_words()) == ["aaaa"]
    clock.now += 0.1
    words.receive(sound(1.8))
    assert texts(words.due_words()) == []
    assert [word.time_s for word in words.end_segment()] == pytest.approx([0.5, 1.0, 1.5])


def test_a_gap_delays_what_is_played(clock):
    words = reply("aaaa bbbb cccc dddd", Pace(10.0))
    words.receive(sound(0.4))
    clock.now += 5.0  # of which 4.6 s nothing was played
    words.receive(sound(1.5))
    assert words.gaps.seconds == pytest.approx(4.6)
    assert texts(words.due_words()) == ["aaaa", "bbbb"]


def test_a_pause_of_the_text_ends_no_playback():
    gaps = Gaps()
    gaps.receive(3.0, 10.0)
    gaps.pause()
    gaps.receive(1.0, 11.0)
    assert gaps.unplayed_s(11.0) == pytest.approx(3.0)
    assert gaps.unplayed_s(20.0) == 0.0


class Told(MegakernelTTSService):
    """The service without a pipeline or a server; it notes the words that it tells."""

    def __init__(self):
        super().__init__()
        self.words = []
        self.changed = asyncio.Event()

    def create_task(self, coroutine, name=None):
        return asyncio.get_running_loop().create_task(coroutine)

    async def add_word_timestamps(self, word_times, *args, **kwargs):
        self.words += [word for word, _ in word_times]
        self.changed.set()


def test_words_are_told_though_no_more_audio_comes():
    async def scenario():
        service = Told()
        service._playbacks["c"] = reply("aaaa bbbb cccc dddd", Pace(20.0))
        service._playbacks["c"].receive(sound(0.9))
        await service._tell_words("c")
        told_at_once = list(service.words)
        while len(service.words) < 4:
            service.changed.clear()
            await asyncio.wait_for(service.changed.wait(), 10.0)
        return told_at_once, service.words

    told_at_once, words = asyncio.run(scenario())
    assert told_at_once == ["aaaa"]
    assert words == ["aaaa", "bbbb", "cccc", "dddd"]


def test_no_word_is_told_of_a_reply_that_was_interrupted_at_the_word_before():
    class Interrupted(Told):
        async def add_word_timestamps(self, word_times, *args, **kwargs):
            await super().add_word_timestamps(word_times)
            self._playbacks.clear()

    async def scenario():
        service = Interrupted()
        service._playbacks["c"] = playback = reply("aaaa bbbb cccc dddd", Pace(20.0))
        playback.receive(sound(0.9))
        await service._add_words("c", playback.end_segment())
        return service.words

    assert asyncio.run(scenario()) == ["aaaa"]
