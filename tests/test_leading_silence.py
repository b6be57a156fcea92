"""Silence before a reply's first sound is left out on request, and later samples stay exact."""

import asyncio
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from session_stage import Stage, run_at_once

from qwen_megakernel.serving.events import ContextAudio, ContextDone, SegmentDone
from qwen_megakernel.serving.leading_silence import LIMIT_S, MARGIN_S, THRESHOLD, LeadingSilence
from qwen_megakernel.serving.native import NativeDialect
from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    Done,
    End,
    Flush,
    Hello,
    Ready,
    Segment,
    Speak,
    encode,
    parse_server_message,
)
from qwen_megakernel.serving.openai_messages import parse_speech
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.wire import SpeechError
from qwen_megakernel.turn import Audio

RATE = 24_000
MARGIN, LIMIT = int(MARGIN_S * RATE), int(LIMIT_S * RATE)
TRIM = SpeechOptions(trim_leading_silence=True)


def utterance(silence, sound):
    """Faint noise, then sound. No two samples are alike, so a slice can be identified."""
    rng = np.random.default_rng(silence)
    faint = rng.uniform(-THRESHOLD, THRESHOLD, silence)
    loud = rng.uniform(2 * THRESHOLD, 1, sound)
    return np.concatenate([faint, loud]).astype(np.float32)


def chunks_of(samples, cuts):
    edges = sorted({min(cut, len(samples)) for cut in cuts} | {0, len(samples)})
    return [samples[a:b] for a, b in pairwise(edges)]


@given(
    silence=st.integers(0, LIMIT + 5000),
    sound=st.integers(0, 3000),
    cuts=st.lists(st.integers(0, LIMIT + 8000), max_size=12),
)
@example(silence=LIMIT + 4000, sound=0, cuts=[LIMIT - 100, LIMIT + 1000])
@example(silence=LIMIT + 4000, sound=100, cuts=[LIMIT + 1000])
def test_however_it_is_split_what_is_sent_is_the_end_of_what_was_generated(silence, sound, cuts):
    samples = utterance(silence, sound)
    beginning = LeadingSilence()
    sent = [beginning.pass_on(chunk) for chunk in chunks_of(samples, cuts)]
    beginning.end_segment()
    until_sound = max(0, min(silence, LIMIT) - MARGIN)
    expected = until_sound if sound or silence >= LIMIT else silence
    assert beginning.num_cut == expected <= LIMIT
    np.testing.assert_array_equal(np.concatenate([samples[:0], *sent]), samples[expected:])


def test_all_that_waited_is_sent_with_the_sound():
    samples = utterance(5000, 100)
    beginning = LeadingSilence()
    assert len(beginning.pass_on(samples[:5000])) == 0
    np.testing.assert_array_equal(beginning.pass_on(samples[5000:]), samples[5000 - MARGIN :])


class Conversation:
    """A native client of a session whose turns the test controls."""

    def __init__(self, **state):
        self.stage = Stage(**state)
        self.dialect = NativeDialect(self.stage.session)
        self.say(Hello())

    def say(self, *messages):
        for message in messages:
            self.dialect.receive(encode(message))

    async def hear(self):
        heard = []
        for event in await self.stage.events():
            raw = [event.message] if hasattr(event, "message") else self.dialect.translate(event)
            heard += map(parse_server_message, raw)
        return heard


async def speak(turn, samples, size=1920):
    for begin in range(0, len(samples), size):
        turn.sink(Audio(samples[begin : begin + size], 0.01))
    turn.num_samples += len(samples)
    turn.finish()
    await asyncio.sleep(0)


def two_segments(**options):
    """A client's messages for two segments. The second begins with silence, too."""

    async def script():
        client = Conversation(**options.pop("state", {}))
        client.say(Speak("a", "One two.", **options), Flush("a"), Speak("a", "Three."), End("a"))
        await speak(client.stage.turns[0], utterance(12_000, 24_000))
        heard = await client.hear()
        await speak(client.stage.turns[1], utterance(6_000, 24_000))
        return client, heard + await client.hear()

    return run_at_once(script())


def of(kind, messages):
    return [message for message in messages if isinstance(message, kind)]


def pcm(messages):
    return b"".join(message.samples for message in of(AudioChunk, messages))


def test_times_of_words_and_segments_are_those_of_the_audio_that_was_sent():
    _, whole = two_segments()
    client, trimmed = two_segments(trim_leading_silence=True)
    cut = 12_000 - MARGIN
    assert pcm(trimmed) == pcm(whole)[2 * cut :]
    (first, second), (long, _) = of(Segment, trimmed), of(Segment, whole)
    assert first.duration_s == pytest.approx(long.duration_s - cut / RATE)
    assert second.start_s == pytest.approx(first.duration_s)
    assert second.duration_s == pytest.approx(1.25)  # the pause between the two is kept
    for segment in (first, second):
        for word in segment.estimated_words:
            assert segment.start_s <= word.start_s < word.end_s
            assert word.end_s <= segment.start_s + segment.duration_s + 1e-3
    (done,) = of(Done, trimmed)
    assert (done.samples, done.trimmed_s) == (36_000 + 30_000 - cut, cut / RATE)
    (record,) = client.stage.records
    assert record.trimmed_s == cut / RATE
    assert f", trimmed {cut * 1000 // RATE} ms" in record.line()


def test_the_engine_hears_what_nobody_plays():
    client, _ = two_segments(trim_leading_silence=True)
    first, second = client.stage.turns
    assert first.skipped_s == pytest.approx((12_000 - MARGIN) / RATE)
    assert second.skipped_s == 0


def test_off_says_nothing_and_changes_nothing():
    client, heard = two_segments()
    assert (of(Done, heard)[0].trimmed_s, of(Ready, heard)[0].trim_leading_silence) == (None, None)
    assert of(Done, heard)[0].samples == 66_000
    assert client.stage.records[0].trimmed_s is None
    assert "trimmed" not in client.stage.records[0].line()


def test_the_server_decides_for_those_who_do_not_say():
    on = {"state": {"trim_leading_silence": True}}
    _, heard = two_segments(**on)
    assert of(Ready, heard)[0].trim_leading_silence is True
    assert of(Done, heard)[0].trimmed_s == (12_000 - MARGIN) / RATE
    _, heard = two_segments(**on, trim_leading_silence=False)
    assert (of(Done, heard)[0].samples, of(Done, heard)[0].trimmed_s) == (66_000, None)


def test_a_context_of_silence_alone_ends_as_any_other():
    async def script():
        stage = Stage()
        stage.session.append("a", "One.", TRIM, ended=True)
        await speak(stage.turns[0], utterance(9_600, 0))
        return stage, await stage.events()

    stage, events = run_at_once(script())
    assert not [event for event in events if isinstance(event, ContextAudio)]
    (segment,) = (event for event in events if isinstance(event, SegmentDone))
    (done,) = (event for event in events if isinstance(event, ContextDone))
    assert (segment.duration_s, segment.reason, done.reason) == (0.0, "stop", "stop")
    assert (done.figures.num_samples, done.figures.trimmed_s, done.figures.ttfc_s) == (0, 0.4, None)
    assert done.figures.rtf == pytest.approx(0.02 / 0.4)
    assert not stage.session.busy


def test_no_more_than_the_limit_is_left_out():
    async def script():
        stage = Stage()
        stage.session.append("a", "One.", TRIM, ended=True)
        await speak(stage.turns[0], utterance(60_000, 24_000))
        return await stage.events()

    events = run_at_once(script())
    sent = np.concatenate([event.samples for event in events if isinstance(event, ContextAudio)])
    np.testing.assert_array_equal(sent, utterance(60_000, 24_000)[LIMIT - MARGIN :])


def test_openai_clients_may_ask_for_it():
    def asked(value):
        return parse_speech(b'{"input": "a", "trim_leading_silence": %s}' % value).trim_leading_silence

    assert (asked(b"true"), asked(b"false"), asked(b"null")) == (True, False, None)
    with pytest.raises(SpeechError, match="trim_leading_silence"):
        asked(b'"yes"')
