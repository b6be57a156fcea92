"""Pauses, respellings and a rate in a session: what is spoken, what is sent, and what is told of it."""

import asyncio
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from session_stage import FakeDecoder, Stage, run_at_once

from qwen_megakernel.serving.events import ContextAudio, ContextDone, ContextFailed, SegmentDone
from qwen_megakernel.serving.native import NativeDialect
from qwen_megakernel.serving.native_messages import (
    Done,
    End,
    Error,
    Hello,
    Ready,
    Segment,
    Speak,
    encode,
    parse_server_message,
)
from qwen_megakernel.serving.openai_messages import parse_speech
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.speaking_rate import SpeakingRate
from qwen_megakernel.serving.wire import SpeechError

TAGS = SpeechOptions(markup=True)


async def speak_all(stage, samples=1920):
    """Speak every turn that is open, in order; all events."""
    events = await stage.events()
    for _ in range(40):
        turn = next((turn for turn in stage.turns if not turn.finished), None)
        if turn is None:
            break
        turn.sound(samples)
        turn.finish()
        events += await stage.events()
    return events


class LoudDecoder(FakeDecoder):
    """Turns whose samples are ones, so that a pause is known by its zeros."""

    def open_turn(self, *args, **options):
        turn = super().open_turn(*args, **options)

        def sound(num_samples):
            turn.num_samples += num_samples
            turn.sink(audio(np.ones(num_samples, np.float32)))

        turn.sound = sound
        return turn


def audio(samples):
    from qwen_megakernel.turn import Audio

    return Audio(samples, 0.01)


def spoken(stage):
    return [turn.text for turn in stage.turns]


def sound_of(events):
    """Runs of equal samples: their value and their number."""
    chunks = [event.samples for event in events if isinstance(event, ContextAudio)]
    samples = np.concatenate([*chunks, np.zeros(0, np.float32)])
    edges = [0, *(np.flatnonzero(np.diff(samples)) + 1), len(samples)]
    return [(float(samples[a]), int(b - a)) for a, b in pairwise(edges) if b > a]


def segments_of(events):
    return [
        (e.index, round(e.start_s, 4), round(e.duration_s, 4))
        for e in events
        if isinstance(e, SegmentDone)
    ]


def run(text, choices=TAGS, **limits):
    """One context of a whole text: the stage and its events."""

    async def go():
        stage = Stage(decoder=LoudDecoder(), **limits)
        stage.session.append("c", text, choices, ended=True)
        return stage, await speak_all(stage)

    return run_at_once(go())


def test_a_break_is_silence_of_exactly_that_length_within_one_segment():
    stage, events = run('Hello. <break time="500ms"/>And <spell>A1</spell>.')
    assert spoken(stage) == ["Hello. ", "And A 1."]
    assert sound_of(events) == [(1.0, 1920), (0.0, 12_000), (1.0, 1920)]
    assert segments_of(events) == [(0, 0.0, 0.66)]
    assert isinstance(events[-1], ContextDone)


@pytest.mark.parametrize(
    ("text", "turns", "sound"),
    [
        ('<break time="0.1s"/>Hi', ["Hi"], [(0.0, 2400), (1.0, 1920)]),
        ('Hi<break time="0.1s"/>', ["Hi"], [(1.0, 1920), (0.0, 2400)]),
        ('<break time="0.1s"/>', [], [(0.0, 2400)]),
        (
            'A<break time="0.1s"/> <break time="0.1s"/>B',
            ["A", "B"],
            [(1.0, 1920), (0.0, 4800), (1.0, 1920)],
        ),
        ("<emotion value='sad'/>", [], []),
        ("Hi <brea", ["Hi "], [(1.0, 1920)]),
    ],
)
def test_pauses_need_no_words(text, turns, sound):
    stage, events = run(text)
    assert spoken(stage) == turns
    assert sound_of(events) == sound
    assert [index for index, *_ in segments_of(events)] == [0]


def test_off_means_untouched_text():
    text = "Hi <break/> <spell>A</spell> Qwen"
    for choices in (SpeechOptions(), SpeechOptions(markup=False)):
        stage, events = run(text, choices)
        assert spoken(stage) == [text]
        assert sound_of(events) == [(1.0, 1920)]
    stage, _ = run(text, SpeechOptions(), markup=True, lexicons={None: {"Qwen": "kwen"}})
    assert spoken(stage) == ["Hi ", " A kwen"]


def test_a_lexicon_of_the_request_goes_before_the_voices_and_that_before_all_voices():
    lexicons = {None: {"a1": "all", "b1": "all", "c1": "all"}, "bob": {"b1": "bob", "c1": "bob"}}
    own = SpeechOptions(voice="bob", lexicon={"c1": "mine"})
    assert spoken(run("a1 b1 c1", own, lexicons=lexicons)[0]) == ["all bob mine"]
    assert spoken(run("a1 b1 c1", SpeechOptions(), lexicons=lexicons)[0]) == ["all all all"]


def test_a_lexicon_cannot_make_a_text_much_longer_than_a_client_may_write():
    stage, events = run("a " * 50, SpeechOptions(lexicon={"a": "x" * 100}), max_text_chars=200)
    assert [event.code for event in events if isinstance(event, ContextFailed)] == ["text_too_long"]
    assert spoken(stage) == []


def test_seeds_count_with_the_segments_whatever_pauses_they_have():
    async def go():
        stage = Stage(decoder=LoudDecoder())
        for text in ("A<break/>B", "C", "D"):
            stage.session.append("c", text, SpeechOptions(seed=7, markup=True))
            stage.session.flush("c")
        stage.session.end("c")
        return stage, await speak_all(stage)

    stage, events = run_at_once(go())
    seeds = {turn.text: turn.options["params"].seed for turn in stage.turns}
    assert (seeds["A"], seeds["C"], seeds["D"]) == (7, 8, 9)
    assert seeds["B"] not in (7, 8, 9)
    assert [index for index, *_ in segments_of(events)] == [0, 1, 2]


def test_a_pause_comes_after_words_that_the_model_left_early():
    async def go():
        stage = Stage(decoder=LoudDecoder())
        stage.session.append("c", "One two", TAGS)
        stage.turns[0].sound(1920)
        stage.turns[0].finish()
        before = await stage.events()
        stage.session.append("c", ' three<break time="0.1s"/>Four')
        stage.session.end("c")
        return stage, before, await speak_all(stage)

    stage, before, after = run_at_once(go())
    assert segments_of(before) == []
    assert spoken(stage) == ["One two", "Four"]
    assert sound_of(before + after) == [(1.0, 1920), (0.0, 2400), (1.0, 1920)]
    assert segments_of(after) == [(0, 0.0, 0.26)]


def test_a_cancel_ends_a_pause():
    async def go():
        stage = Stage(decoder=LoudDecoder())
        stage.session.append("c", '<break time="10s"/>Hi', TAGS)
        first = await asyncio.wait_for(stage.session.take(), 1)
        stage.session.cancel("c")
        return first, await stage.events()

    first, rest = run_at_once(go())
    assert sum(len(event.samples) for event in first if isinstance(event, ContextAudio)) < 24_000
    assert sound_of(rest) == []
    assert isinstance(rest[-1], ContextDone)


def test_a_long_pause_waits_for_the_client_as_speech_does():
    async def go():
        stage = Stage(decoder=LoudDecoder())
        stage.session.append("c", '<break time="10s"/>', TAGS, ended=True)
        unsent = stage.session.unsent_bytes
        await asyncio.wait_for(stage.session.take(), 1)
        (context,) = stage.session._contexts.values()
        return unsent, context.state

    unsent, state = run_at_once(go())
    assert unsent < 100_000
    assert state == "speaking"


@settings(deadline=None, max_examples=40)
@given(
    bits=st.lists(
        st.sampled_from(
            ["Hi", " ", "a1", "<break time='0.1s'/>", "<spell>", "</spell>", "<b>", "<bre", ". ", "a"]
        ),
        min_size=1,
        max_size=8,
    ),
    cuts=st.lists(st.integers(0, 80), max_size=8),
)
def test_any_split_of_a_text_gives_the_same_turns_and_the_same_silence(bits, cuts):
    text = "".join(bits)
    edges = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    choices = SpeechOptions(seed=3, markup=True, lexicon={"a1": "sauce"})

    async def go(pieces):
        stage = Stage(decoder=LoudDecoder())
        for piece in pieces:
            stage.session.append("c", piece, choices)
        stage.session.end("c")
        events = await speak_all(stage)
        told = [(turn.text, turn.options["params"].seed) for turn in stage.turns]
        return told, sound_of(events), segments_of(events)

    assert run_at_once(go([text[a:b] for a, b in pairwise(edges)])) == run_at_once(go([text]))


# -- the rate -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    speed=st.sampled_from([0.3, 0.5, 0.9, 1.5, 4.0]), cuts=st.lists(st.integers(1, 24_000), max_size=6)
)
@example(speed=4.0, cuts=[1])
def test_however_audio_is_split_a_rate_gives_the_same_samples(speed, cuts):
    pytest.importorskip("av")
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, 24_000).astype(np.float32)
    edges = sorted({*cuts, 0, len(samples)})

    def change(pieces):
        rate = SpeakingRate(speed)
        return np.concatenate([*(rate.change(piece) for piece in pieces), rate.end()])

    whole = change([samples])
    assert np.array_equal(change([samples[a:b] for a, b in pairwise(edges)]), whole)
    assert abs(len(whole) - len(samples) / speed) < 2400 / speed


def test_a_rate_keeps_the_pitch():
    pytest.importorskip("av")
    tone = np.sin(np.arange(48_000) * 2 * np.pi * 200 / 24_000).astype(np.float32)
    for speed in (0.25, 0.8, 1.25, 2.0):
        rate = SpeakingRate(speed)
        changed = np.concatenate([rate.change(tone), rate.end()])
        peak = np.abs(np.fft.rfft(changed)).argmax() * 24_000 / len(changed)
        assert peak == pytest.approx(200, abs=3)


def test_a_faster_turn_is_sent_shorter_and_needs_its_frames_earlier():
    pytest.importorskip("av")

    async def go():
        stage = Stage(decoder=LoudDecoder())
        text = 'Hello.<break time="0.1s"/>'
        stage.session.append("c", text, SpeechOptions(markup=True, speed=2.0), ended=True)
        return stage, await speak_all(stage, 48_000)

    stage, events = run_at_once(go())
    num_samples = sum(len(event.samples) for event in events if isinstance(event, ContextAudio))
    assert num_samples == pytest.approx(24_000 + 2400, abs=1500)
    assert stage.turns[0].skipped_s == pytest.approx(1.0, abs=0.1)
    ((_, _, duration_s),) = segments_of(events)
    assert duration_s == pytest.approx(num_samples / 24_000, abs=1e-3)


# -- the wire -------------------------------------------------------------------------------------


async def converse(stage, *messages):
    dialect = NativeDialect(stage.session)
    for message in (Hello(), *messages):
        dialect.receive(encode(message))
    sent = []
    for event in await speak_all(stage, 24_000):
        replies = [event.message] if hasattr(event, "message") else dialect.translate(event)
        sent += [parse_server_message(data) for data in replies]
    return sent


def of(kind, messages):
    return [message for message in messages if isinstance(message, kind)]


def test_words_are_told_as_they_were_written_and_a_pause_delays_those_after_it():
    async def go():
        stage = Stage(decoder=LoudDecoder())
        text = 'Ask Qwen: <spell>AB</spell>.<break time="2s"/>Then go.'
        speak = Speak("c", text, markup=True, lexicon={"Qwen": "kwenn"})
        return stage, await converse(stage, speak, End("c"))

    stage, messages = run_at_once(go())
    assert spoken(stage) == ["Ask kwenn: A B.", "Then go."]
    ((words,),) = [[segment.estimated_words] for segment in of(Segment, messages)]
    assert [word.text for word in words] == ["Ask", "Qwen:", "AB.", "Then", "go."]
    starts = {word.text: word.start_s for word in words}
    # 1 s of audio, 2 s of silence, 1 s of audio.
    assert starts["AB."] < 1.0 + 0.3
    assert 3.0 - 0.3 <= starts["Then"] <= 3.3
    assert of(Done, messages)[0].duration_s == 4.0


@pytest.mark.parametrize(
    "fields",
    [
        '"lexicon":{"a":1}',
        '"lexicon":[]',
        '"lexicon":{"":"x"}',
        '"speed":5',
        '"speed":"fast"',
        '"markup":1',
    ],
)
def test_a_wrong_field_is_refused_in_one_line(fields):
    async def go():
        stage = Stage()
        dialect = NativeDialect(stage.session)
        dialect.receive(encode(Hello()))
        dialect.receive(f'{{"type":"speak","context_id":"c","text":"Hi",{fields}}}')
        return [parse_server_message(event.message) for event in await stage.events()]

    assert [error.code for error in of(Error, run_at_once(go()))] == ["bad_request"]
    with pytest.raises(SpeechError, match=fields[1:5]):
        parse_speech(f'{{"input":"Hi",{fields}}}'.encode())


def test_a_client_is_told_that_the_server_follows_tags_unasked():
    for markup, told in ((True, True), (False, None)):

        async def go(markup=markup):
            return await converse(Stage(markup=markup))

        assert [ready.markup for ready in of(Ready, run_at_once(go()))] == [told]


def test_openais_route_takes_the_same_choices():
    asked = parse_speech(b'{"input":"Hi","markup":true,"lexicon":{"a":"b"},"speed":1.5}')
    assert (asked.markup, asked.lexicon, asked.speed) == (True, {"a": "b"}, 1.5)
